"""The exact command that starts an engine on a checkpoint, checked before anything is started."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.checkpoint import Checkpoint
from weightkit.errors import PlanError, WeightkitError, raise_all
from weightkit.family import Architecture, is_mtp
from weightkit.serving.checks import Subject, check, needs_remote_code, usual_mla
from weightkit.serving.engines import ENGINES, Engine, Settings, command_line
from weightkit.smoke import Check

CONTEXT = 32_768
"""Tokens of a request where none are asked for. Engines reserve their cache for the longest one before they take any,
and DeepSeek-V3's 163,840 do not fit beside its weights everywhere."""
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Launch:
    """An engine's command line for a checkpoint, and what was looked at to know that it is right.

    Attributes:
        engine: the engine.
        argv: the program and its arguments.
        env: variables that must be set besides.
        tp: GPUs that it takes.
        weights_bytes: bytes of the tensors that it loads.
        endpoint: the address that it will serve; None for the demo, which serves none.
        health_url: where it answers 200 once it is ready; None for the demo.
        checks: what was looked at, in order.
        problems: why it would not work; empty where nothing is known against it.
        notes: what is worth knowing and no problem.
    """

    engine: Engine
    argv: tuple[str, ...]
    env: Mapping[str, str]
    tp: int
    weights_bytes: int
    endpoint: str | None
    health_url: str | None
    checks: tuple[Check, ...]
    problems: tuple[WeightkitError, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def shell(self) -> str:
        """The command as one line for a shell."""
        return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in self.env.items()), shlex.join(self.argv)])

    def require(self) -> None:
        """Raise all problems, where there are any."""
        raise_all(f"{self.engine.title} cannot serve this checkpoint", self.problems)

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return {
            "engine": self.engine.name,
            "version_read": self.engine.version,
            "command": self.shell,
            "argv": list(self.argv),
            "env": dict(self.env),
            "endpoint": self.endpoint,
            "health_url": self.health_url,
            "checks": [one.to_json() for one in self.checks],
            "notes": list(self.notes),
        }


def command(
    engine: str,
    checkpoint: Checkpoint,
    tp: int,
    *,
    context: int | None = None,
    host: str = HOST,
    port: int | None = None,
    mtp: int = 0,
    demo: Path | None = None,
) -> Launch:
    """The command that serves ``checkpoint``, with every reason why it would fail. Reads headers and side files.

    Args:
        engine: ``vllm``, ``sglang``, ``lmdeploy`` or ``demo``.
        checkpoint: as opened; engines need the published layout, the demo rank files.
        tp: GPUs of this machine that share the weights.
        context: tokens that a request may have; default: 32,768, or as many as the model knows.
        host: the address to listen on; this machine alone by default.
        port: the port; default: the engine's own.
        mtp: tokens to draft at once with the MTP layers; 0: none.
        demo: the folder of DeepSeek's ``generate.py``; default: ``inference`` in the checkpoint's folder.

    Raises:
        PlanError: no such engine.
        ConfigError: the config is broken.
    """
    known = ENGINES.get(engine)
    if known is None:
        raise PlanError("no such engine", where=engine, expected=", ".join(ENGINES))
    arch = Architecture.from_config(checkpoint.config, where=str(checkpoint.root))
    subject = Subject(checkpoint, arch, known, tp, context, mtp)
    checks, problems = check(subject)
    at = port or known.port or 0
    settings = Settings(
        path=subject.folder.absolute(),
        tp=tp,
        context=context or min(CONTEXT, arch.max_position_embeddings),
        host=host,
        port=at,
        mtp=mtp,
        dtype="bfloat16" if arch.dtype == "F32" else None,
        trust_remote_code=needs_remote_code(subject),
        demo=(demo or subject.folder / "inference").absolute() if known.name == "demo" else None,
    )
    endpoint = _endpoint(host, at) if known.health else None
    return Launch(
        engine=known,
        argv=tuple(command_line(known, settings)),
        env={},
        tp=tp,
        weights_bytes=checkpoint.size_bytes if mtp else _without_mtp(checkpoint, arch),
        endpoint=endpoint,
        health_url=f"{endpoint}{known.health}" if endpoint else None,
        checks=tuple(checks),
        problems=tuple(problems),
        notes=tuple(_notes(subject, settings)),
    )


def _without_mtp(checkpoint: Checkpoint, arch: Architecture) -> int:
    from weightkit.checkpoint.tensors import size_bytes

    return sum(size_bytes(tensor) for name, tensor in checkpoint.tensors.items() if not is_mtp(name, arch))


def _endpoint(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on ``host``."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _notes(subject: Subject, settings: Settings) -> list[str]:
    engine, arch = subject.engine, subject.arch
    notes = []
    if settings.trust_remote_code and engine.health:
        notes.append("--trust-remote-code runs the Python code of the checkpoint's tokenizer. Read it first.")
    if settings.dtype is not None and engine.health:
        notes.append("The weights are F32; it computes in BF16.")
    drafts = engine.draft_models and not (engine.name == "sglang" and arch.is_gptq)
    if not subject.mtp and drafts and arch.num_nextn_predict_layers:
        notes.append("It has MTP layers, which are not used: --mtp 1 drafts with them.")
    if subject.context is None and engine.health and settings.context < arch.max_position_embeddings:
        longest = arch.max_position_embeddings
        notes.append(f"--context {settings.context} by default; the model knows {longest} positions.")
    if subject.mtp and engine.name == "lmdeploy" and subject.tp > 1 and arch.model_type != "glm_moe_dsa":
        notes.append("LMDeploy keeps the MTP layer whole on each GPU.")
    if engine.name in ("sglang", "lmdeploy") and not usual_mla(arch):
        notes.append(f"Whether {engine.title} has attention kernels for these widths is not known.")
    return notes
