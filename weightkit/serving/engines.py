"""The serving engines: where their rules and flags were read, and the command line of each.

Read in: vLLM 0.25.1 and SGLang 0.5.23 as published on PyPI, LMDeploy 0.16.0 (commit 1263d5c), DeepSeek's inference demo
(DeepSeek-V3, commit 9b4e978). Each function says which of the engine's files a flag comes from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EngineName = Literal["vllm", "sglang", "lmdeploy", "demo"]


@dataclass(frozen=True, slots=True)
class Engine:
    """A serving engine.

    Attributes:
        name: what ``launch`` calls it.
        title: its name for people.
        version: the version in which its rules and flags were read.
        port: the port that it listens on by itself; None for the demo, which serves nothing.
        health: the path that answers 200 once it is ready.
        program: the program that must be on PATH.
        module: the Python module that the program must find; None where the program is the engine's own.
        reads: what weights it reads, by the words of ``form_of``.
        draft_models: ``model_type`` of the members whose MTP layers it can draft with.
    """

    name: EngineName
    title: str
    version: str
    port: int | None
    health: str | None
    program: str
    module: str | None
    reads: frozenset[str]
    draft_models: frozenset[str] = frozenset()


_FLOATS = frozenset(("BF16", "F16", "F32"))
_WITH_MTP = frozenset(("deepseek_v3", "deepseek_v32", "glm_moe_dsa"))

ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        # vllm/entrypoints/serve/instrumentator/health.py; config/speculative.py: hf_config_override
        Engine("vllm", "vLLM", "0.25.1", 8000, "/health", "vllm", None, _FLOATS | {"FP8", "GPTQ"}, _WITH_MTP),
        # sglang/srt/entrypoints/http_server.py: /health; arg_groups/speculative_hook.py: _handle_eagle_family
        Engine(
            "sglang",
            "SGLang",
            "0.5.23",
            30000,
            "/health",
            "python3",
            "sglang",
            _FLOATS | {"FP8", "GPTQ"},
            _WITH_MTP,
        ),
        # lmdeploy/serve/openai/endpoints/management.py; pytorch/config.py: QuantizationConfig.from_config, which knows
        # awq, smooth_quant and fp8 and raises for gptq; pytorch/configurations/deepseek_v2.py: deepseek_mtp
        Engine("lmdeploy", "LMDeploy", "0.16.0", 23333, "/health", "lmdeploy", None, _FLOATS | {"FP8"}, _WITH_MTP),
        # inference/generate.py
        Engine("demo", "DeepSeek's demo", "9b4e978", None, None, "torchrun", None, _FLOATS | {"FP8"}),
    )
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a command line is made from.

    Attributes:
        path: the checkpoint's folder, absolute.
        tp: GPUs that share the weights.
        context: tokens that a request may have, prompt and answer.
        host: the address to listen on.
        port: the port to listen on.
        mtp: tokens to draft with the MTP layers; 0: none.
        dtype: what to compute in, in torch's spelling; None: as the config says.
        trust_remote_code: whether the checkpoint's own Python code must run.
        demo: the folder of the demo's ``generate.py``.
    """

    path: Path
    tp: int
    context: int
    host: str
    port: int
    mtp: int = 0
    dtype: str | None = None
    trust_remote_code: bool = False
    demo: Path | None = None


def command_line(engine: Engine, settings: Settings) -> list[str]:
    """The program and its arguments."""
    build = {"vllm": _vllm, "sglang": _sglang, "lmdeploy": _lmdeploy, "demo": _demo}
    return build[engine.name](settings)


def _vllm(settings: Settings) -> list[str]:
    """Flags: ``vllm/engine/arg_utils.py`` (``add_cli_args``) and ``entrypoints/openai/cli_args.py`` (``model_tag``,
    ``--host``, ``--port``). The method's name is ``mtp`` since ``deepseek_mtp`` is deprecated
    (``config/speculative.py``). GPTQ and FP8 are found in the config, Marlin is chosen by itself
    (``layers/quantization/auto_gptq.py``)."""
    line = ["vllm", "serve", str(settings.path), "--host", settings.host, "--port", str(settings.port)]
    line += ["--tensor-parallel-size", str(settings.tp), "--max-model-len", str(settings.context)]
    line += _dtype_and_trust(settings)
    if settings.mtp:
        draft = {"method": "mtp", "num_speculative_tokens": settings.mtp}
        line += ["--speculative-config", json.dumps(draft, separators=(",", ":"))]
    return line


def _sglang(settings: Settings) -> list[str]:
    """Flags: ``sglang/srt/arg_groups/fields/`` ``model.py``, ``parallel.py``, ``serving.py`` and ``spec.py``; a field's
    name is its flag's. ``python -m`` works in all versions; newer ones have ``sglang serve`` too
    (``launch_server.py``). NEXTN is another name for EAGLE, which drafts with the target's own MTP layers where no
    draft model is named, and verifies one token more than it drafts (``arg_groups/speculative_hook.py``)."""
    line = ["python3", "-m", "sglang.launch_server", "--model-path", str(settings.path)]
    line += ["--host", settings.host, "--port", str(settings.port)]
    line += ["--tp-size", str(settings.tp), "--context-length", str(settings.context)]
    line += _dtype_and_trust(settings)
    if settings.mtp:
        line += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(settings.mtp)]
        line += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(settings.mtp + 1)]
    return line


def _lmdeploy(settings: Settings) -> list[str]:
    """Flags: ``lmdeploy/cli/serve.py`` (``--server-name``, ``--server-port``) and ``cli/utils.py``. The TurboMind
    backend, its default, knows none of the family (``turbomind/supported_models.py``)."""
    line = ["lmdeploy", "serve", "api_server", str(settings.path), "--backend", "pytorch"]
    line += ["--server-name", settings.host, "--server-port", str(settings.port)]
    line += ["--tp", str(settings.tp), "--session-len", str(settings.context)]
    line += _dtype_and_trust(settings)
    if settings.mtp:
        line += ["--speculative-algorithm", "deepseek_mtp", "--speculative-num-draft-tokens", str(settings.mtp)]
    return line


def _demo(settings: Settings) -> list[str]:
    """Flags: ``inference/generate.py``. It answers at a prompt, or a file of messages, and serves nothing."""
    from weightkit.layouts.ranks import DEMO_CONFIG_NAME

    script = (settings.demo or Path()) / "generate.py"
    line = ["torchrun", "--nproc-per-node", str(settings.tp), str(script), "--ckpt-path", str(settings.path)]
    return [*line, "--config", str(settings.path / DEMO_CONFIG_NAME)]


def _dtype_and_trust(settings: Settings) -> list[str]:
    """Two flags that the three servers spell alike."""
    line = ["--dtype", settings.dtype] if settings.dtype is not None else []
    return [*line, "--trust-remote-code"] if settings.trust_remote_code else line
