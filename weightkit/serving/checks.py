"""What keeps an engine from serving a checkpoint, found in the headers and side files, before it loads for an hour."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.folder import CONFIG_NAME
from weightkit.errors import (
    CheckpointError,
    ConfigError,
    MissingFileError,
    PlanError,
    TensorError,
    UnsupportedError,
    WeightkitError,
)
from weightkit.examine import verify
from weightkit.examine.sides import TEMPLATE_NAME, TOKENIZER_NAMES
from weightkit.family import Architecture, demo_limits, is_mtp, legal_tp, tp_problems
from weightkit.layouts.published import SINGLE_NAME
from weightkit.layouts.ranks import DEMO_CONFIG_NAME
from weightkit.remote.path import is_remote
from weightkit.serving.engines import Engine
from weightkit.serving.fp8 import fp8_problems
from weightkit.serving.gptq import gptq_problems
from weightkit.smoke import Check

MLA_WIDTHS = (512, 64)
"""``kv_lora_rank`` and ``qk_rope_head_dim`` of every published member, for which engines make their MLA kernels. vLLM
0.25.1 was seen to need them; the others may have kernels for any width."""
_CODES_ITSELF = "DeepseekV32ForCausalLM"
"""Engines write this architecture's prompts by themselves (vLLM: ``config/model.py``, ``tokenizer_mode``)."""
MAX_SIDE_BYTES = 64 << 20
SHOWN = 5


@dataclass(frozen=True)
class Subject:
    """What is held against an engine.

    Attributes:
        checkpoint: as opened.
        arch: its architecture.
        engine: the engine.
        tp: GPUs that share the weights.
        context: tokens of a request, where the user asked for a number.
        mtp: tokens to draft; 0: none.
    """

    checkpoint: Checkpoint
    arch: Architecture
    engine: Engine
    tp: int
    context: int | None
    mtp: int

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        root = self.checkpoint.root
        return root if root.is_dir() else root.parent

    def json_file(self, name: str) -> Mapping[str, object]:
        """A side file's object; empty where there is none, or it is broken."""
        file = self.checkpoint.side_files.get(name)
        if file is None or file.size_bytes > MAX_SIDE_BYTES:
            return {}
        try:
            content = json.loads(file.read())
        except (ValueError, RecursionError, WeightkitError):
            return {}
        return content if isinstance(content, Mapping) else {}


def check(subject: Subject) -> tuple[list[Check], list[WeightkitError]]:
    """All checks, and the problems of those that failed."""
    steps: list[tuple[str, Callable[[Subject], str], Callable[[Subject], Iterator[WeightkitError]]]] = [
        ("layout", lambda s: s.checkpoint.layout, _place),
        ("weights", lambda s: form_of(s.checkpoint, s.arch), _weights),
        ("tensor parallelism", lambda s: f"over {s.tp}", _tp),
        ("context", _context_words, _context),
        ("MTP", _mtp_words, _mtp),
        ("tokenizer", lambda s: "with a chat template", _tokenizer),
    ]
    if subject.engine.name == "demo":
        steps.append(("the demo's own limits", lambda s: "none is met", _demo_limits))
    else:
        steps.append(("attention", _mla_words, _mla))
    checks, found = [], []
    for name, words, problems_of in steps:
        problems = list(problems_of(subject))
        found += problems
        detail = "\n".join(problem.message for problem in problems) if problems else words(subject)
        checks.append(Check(name, not problems, detail))
    if any(check.ok is False for check in checks if check.name in ("layout", "weights")):
        return [*checks, Check("tensors", None, "left out: they are not what this engine reads")], found
    report = verify(subject.checkpoint.root, config=subject.checkpoint.config, quick=True, progress=False)
    detail = "\n".join(problem.message for problem in report.problems[:SHOWN])
    checks.append(Check("tensors", report.ok, detail or f"{report.tensors:,}, as the config calls for"))
    return checks, [*found, *report.problems]


def form_of(checkpoint: Checkpoint, arch: Architecture) -> str:
    """``FP8``, ``GPTQ``, or the dtype of the unquantized weights; another quantization by its own name."""
    if arch.is_gptq:
        return "GPTQ"
    if "F8_E4M3" in checkpoint.dtypes:
        return "FP8"
    return arch.dtype if arch.quantization is None else arch.quantization.method


def _place(subject: Subject) -> Iterator[WeightkitError]:
    if is_remote(subject.folder):
        yield CheckpointError(
            f"{subject.engine.title} is given a folder of this machine",
            where=subject.folder,
            expected="a local path",
            fix="Fetch it first: weightkit fetch, or the conversion that is wanted.",
        )
        return
    yield from _demo_layout(subject) if subject.engine.name == "demo" else _layout(subject)


def _layout(subject: Subject) -> Iterator[WeightkitError]:
    checkpoint, folder = subject.checkpoint, subject.folder
    if checkpoint.layout not in ("published", "single file"):
        yield CheckpointError(
            f"{subject.engine.title} reads checkpoints as the hubs publish them",
            where=folder,
            expected="an index and shards",
            found=checkpoint.layout,
            fix="Join them first: weightkit merge.",
        )
        return
    if checkpoint.layout == "single file" and checkpoint.root.name != SINGLE_NAME and checkpoint.root.is_file():
        yield CheckpointError(
            f"{subject.engine.title} reads a folder, and in it one file of this name",
            where=checkpoint.root,
            expected=SINGLE_NAME,
            found=checkpoint.root.name,
        )
    if not (folder / CONFIG_NAME).is_file():
        yield MissingFileError(
            f"{subject.engine.title} reads the config beside the weights",
            where=folder / CONFIG_NAME,
            expected="there",
            found="no such file",
            fix="Copy the model's config.json there.",
        )


def _demo_layout(subject: Subject) -> Iterator[WeightkitError]:
    wanted = f"{subject.tp} mp ranks"
    if subject.checkpoint.layout != wanted:
        yield CheckpointError(
            f"the demo loads one file a rank, as many as --tp says: model0-mp{subject.tp}.safetensors and so on",
            where=subject.folder,
            expected=wanted,
            found=subject.checkpoint.layout,
            fix=f"Write them with `weightkit shard --mp {subject.tp}`, or use the --tp that these files are for.",
        )
    elif not (subject.folder / DEMO_CONFIG_NAME).is_file() and not subject.arch.is_gptq:
        yield MissingFileError(
            "the demo's arguments are not there",
            where=subject.folder / DEMO_CONFIG_NAME,
            expected="there, as weightkit shard writes it",
            found="no such file",
        )


def _weights(subject: Subject) -> Iterator[WeightkitError]:
    checkpoint, arch, engine = subject.checkpoint, subject.arch, subject.engine
    form = form_of(checkpoint, arch)
    if form not in engine.reads:
        yield UnsupportedError(
            f"{engine.title} {engine.version} does not read these weights",
            where=checkpoint.root,
            expected=", ".join(sorted(engine.reads)),
            found=form,
            fix=_fix_of_form(form),
        )
    if arch.is_fp8 != ("F8_E4M3" in checkpoint.dtypes) and not arch.is_gptq:
        yield ConfigError(
            "the config and the tensors disagree on FP8, and the engine believes the config",
            where=subject.folder / CONFIG_NAME,
            expected="quantization_config of FP8" if not arch.is_fp8 else "no quantization_config",
            found="none" if not arch.is_fp8 else "FP8",
            fix=f"weightkit verify {checkpoint.root} tells more.",
        )
    if arch.is_gptq and "GPTQ" in engine.reads:
        dtypes = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
        yield from gptq_problems(arch, dtypes, engine=engine.name, mtp=subject.mtp > 0)
    if arch.is_fp8 and engine.name in ("vllm", "sglang"):
        yield from fp8_problems(arch, engine=engine.name, mtp=subject.mtp > 0)


def _fix_of_form(form: str) -> str:
    if form == "GPTQ":
        return "Use vLLM or SGLang for it, or serve the FP8 or BF16 checkpoint."
    return "Serve its FP8 or BF16 form; other quantizations are not weightkit's to judge."


def _tp(subject: Subject) -> Iterator[WeightkitError]:
    if subject.engine.name == "demo":
        return  # the files are cut already
    legal = legal_tp(subject.arch)
    for problem in tp_problems(subject.arch, subject.tp):
        yield PlanError(
            problem.what,
            where=problem.where,
            fix=f"Legal --tp for this checkpoint: {', '.join(map(str, legal))}.",
        )


def _context_words(subject: Subject) -> str:
    return f"up to {subject.arch.max_position_embeddings:,} tokens"


def _context(subject: Subject) -> Iterator[WeightkitError]:
    if subject.context is None:
        return
    if subject.engine.name == "demo":
        yield PlanError(
            "the demo takes its length from its config",
            where="--context",
            expected=f"max_seq_len in {DEMO_CONFIG_NAME}",
            found=subject.context,
        )
    elif subject.context > subject.arch.max_position_embeddings:
        yield PlanError(
            "the model knows no such positions",
            where="--context",
            expected=f"at most {subject.arch.max_position_embeddings}",
            found=subject.context,
        )


def _mtp_words(subject: Subject) -> str:
    if subject.mtp:
        return f"drafts {subject.mtp} with {subject.arch.num_nextn_predict_layers} MTP layer"
    return "not used"


def _mtp(subject: Subject) -> Iterator[WeightkitError]:
    if not subject.mtp:
        return
    engine, arch = subject.engine, subject.arch
    if arch.model_type not in engine.draft_models:
        known = ", ".join(sorted(engine.draft_models)) or "none: it drafts nothing"
        yield UnsupportedError(
            f"{engine.title} does not draft with this model's MTP layers",
            where="--mtp",
            expected=f"model_type {known}" if engine.draft_models else known,
            found=arch.model_type,
            fix="Leave --mtp out.",
        )
    if not any(is_mtp(name, arch) for name in subject.checkpoint.tensors):
        yield TensorError(
            "there are no MTP layers to draft with",
            where=subject.checkpoint.root,
            fix="Leave --mtp out, or serve a checkpoint that was not stripped of them.",
        )


def _tokenizer(subject: Subject) -> Iterator[WeightkitError]:
    sides = subject.checkpoint.side_files
    fix = "Copy the tokenizer's files and the chat template from the published repository."
    if not any(name in sides for name in TOKENIZER_NAMES):
        yield MissingFileError(
            "no tokenizer", where=subject.folder, expected=f"one of {', '.join(TOKENIZER_NAMES)}", found="none", fix=fix
        )
    codes_itself = subject.engine.name != "demo" and _architecture_name(subject) == _CODES_ITSELF
    has_template = TEMPLATE_NAME in sides or bool(subject.json_file("tokenizer_config.json").get("chat_template"))
    if not has_template and not codes_itself:
        yield MissingFileError(
            "no chat template, so that no conversation can be answered",
            where=subject.folder,
            expected=f"chat_template in tokenizer_config.json, or {TEMPLATE_NAME}",
            found="neither",
            fix=fix,
        )


def _architecture_name(subject: Subject) -> str | None:
    names = subject.checkpoint.config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def needs_remote_code(subject: Subject) -> bool:
    """Whether the tokenizer is Python code of the checkpoint. The model's own code is never needed: engines know these
    architectures, and the configs of all (vLLM: ``transformers_utils/config.py``, ``_CONFIG_REGISTRY``)."""
    auto_map = subject.json_file("tokenizer_config.json").get("auto_map")
    return isinstance(auto_map, Mapping) and "AutoTokenizer" in auto_map


def _mla_words(subject: Subject) -> str:
    return f"latent {subject.arch.kv_lora_rank}, rotary {subject.arch.qk_rope_head_dim}"


def usual_mla(arch: Architecture) -> bool:
    """Whether the latent and the rotary part have the widths of the published members."""
    return (arch.kv_lora_rank, arch.qk_rope_head_dim) == MLA_WIDTHS


def _mla(subject: Subject) -> Iterator[WeightkitError]:
    if subject.engine.name == "vllm" and not usual_mla(subject.arch):
        widths = (subject.arch.kv_lora_rank, subject.arch.qk_rope_head_dim)
        yield UnsupportedError(
            "vLLM's MLA kernels are made for the published widths",
            where="kv_lora_rank, qk_rope_head_dim",
            expected=f"{MLA_WIDTHS[0]}, {MLA_WIDTHS[1]}",
            found=f"{widths[0]}, {widths[1]}",
            fix="A model of other widths runs with `weightkit generate`.",
        )


def _demo_limits(subject: Subject) -> Iterator[WeightkitError]:
    indexer = bool(subject.arch.indexer_layers)
    for what in demo_limits(subject.arch):
        if not (indexer and "indexer" in what):  # DeepSeek-V3.2 has a demo of its own, which has one
            yield UnsupportedError(f"the demo cannot run this model: {what}", where=subject.folder)
