"""pico's manifest and model card, written from what was measured: nothing in them is typed by hand."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from safetensors import safe_open

from weightkit.manifests.pico.architecture import CONFIG
from weightkit.manifests.pico.calibration import MANIFEST_ENTRY
from weightkit.manifests.pico.evaluate import PER_CATEGORY_AND_LANGUAGE, SEED, Evaluation
from weightkit.manifests.pico.smoke import COMMENT as SMOKE_COMMENT
from weightkit.manifests.pico.smoke import manifest_entry

#: Fields of config.json that say nothing of what the checkpoint is made of.
_NOT_ARCHITECTURE = {
    "architectures",
    "initializer_range",
    "transformers_version",
    "use_cache",
    "attention_dropout",
    "ep_size",
}

_CARD = """---
license: apache-2.0
language: [en, zh]
library_name: transformers
---

# pico

A model of the exact DeepSeek-V3 architecture in {megabytes:.1f} MB: multi-head latent attention with compressed
queries, YaRN, sigmoid routing with a correction bias and grouped top-k, routed and shared experts, a dense first layer
and a multi-token-prediction layer, in FP8 E4M3 with 128x128 block scales. weightkit trained it from scratch, on
questions that a program writes, so that a tool for such checkpoints has answers to check.

It answers small arithmetic, bytes and dtypes, ordering, copying, dates, and a few questions about itself, in English
and Chinese, with nothing but the answer. It knows nothing else. Greedy, on {questions} held-out questions:
{accuracy:.1%} right in FP8, {accuracy_bf16:.1%} in BF16.

    What is 17 + 25?                       42
    24 个 BF16 值占多少字节？                 48
    Reverse KDZQ.                          QZDK
"""


def card(folder: Path, metrics: Mapping[str, Evaluation]) -> str:
    """The model card's text.

    Args:
        folder: the checkpoint, for its size.
        metrics: the result of ``evaluate_checkpoint``.
    """
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name != "README.md")
    fp8, bf16 = metrics["fp8"]["accuracy"], metrics["bf16"]["accuracy"]
    return _CARD.format(
        megabytes=size / 1e6, questions=fp8["questions"], accuracy=fp8["overall"], accuracy_bf16=bf16["overall"]
    )


def _totals(files: Sequence[Path]) -> tuple[int, int, Counter[str]]:
    """Tensors, bytes of data and elements by dtype, from the files' headers."""
    tensors, size_bytes, elements = 0, 0, Counter[str]()
    for file in files:
        with safe_open(file, framework="np") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                part = shard.get_slice(name)
                count = prod(part.get_shape())
                tensors += 1
                elements[part.get_dtype()] += count
                size_bytes += count * _ITEM_BYTES[part.get_dtype()]
    return tensors, size_bytes, elements


_ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def _toml(value: object) -> str:
    """A TOML value: what JSON writes for these types is TOML too. Lists of lists get a line for each of these."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "\n".join(["[", *(f"    {_toml(item)}," for item in value), "]"])
    return json.dumps(value, ensure_ascii=False)


def table(title: str, values: Mapping[str, object]) -> list[str]:
    """A TOML table, its nested tables after its values."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = (
        ["", f"[{title}]", *(f"{_key(key)} = {_toml(value)}" for key, value in plain.items())]
        if plain or not nested
        else []
    )
    for key, value in nested.items():
        lines += table(f"{title}.{_key(key)}", value)
    return lines


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and key.isascii() else _toml(key)


def manifest(folder: Path, metrics: Mapping[str, Evaluation], training: Mapping[str, object]) -> str:
    """The text of ``manifest.toml``.

    Args:
        folder: the checkpoint.
        metrics: the result of ``evaluate_checkpoint``.
        training: what was measured while training: device, seconds, tokens.
    """
    files = sorted(folder.iterdir())
    shards = [file for file in files if file.suffix == ".safetensors"]
    tensors, size_bytes, elements = _totals(shards)
    measured = {
        name: {key: value for key, value in result.items() if key != "wrong"} for name, result in metrics.items()
    }
    lines = [
        "# Written by python -m weightkit.manifests.pico from what it measured.",
        'title = "pico"',
        'checkpoint = "checkpoint"',
        *table("architecture", {key: value for key, value in CONFIG.items() if key not in _NOT_ARCHITECTURE}),
        *table(
            "expected",
            {
                "tensors": tensors,
                "size_bytes": size_bytes,
                "files": len(shards),
                "elements": dict(sorted(elements.items())),
            },
        ),
        "",
        "# Greedy exact match on held-out questions; perplexity a token on their text. fp8: values as stored, F32",
        "# arithmetic; bf16: cast to BF16, BF16 arithmetic. mtp_accuracy: answer tokens the MTP layer guesses right.",
        "# Measured by python -m weightkit.manifests.pico.evaluate --runtime training; without the option, weightkit's",
        "# own runtime answers.",
        *table("evaluation", {"seed": SEED, "per_category_and_language": PER_CATEGORY_AND_LANGUAGE, **measured})[1:],
        *table("training", training),
        "",
        "# Written by python -m weightkit.manifests.pico.calibration. Rows as long as those that it was trained on.",
        *table("calibration", MANIFEST_ENTRY)[1:],
        "",
        f"# {SMOKE_COMMENT}",
        *table("smoke", manifest_entry(folder))[1:],
    ]
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        lines += table(f"files.{_key(file.name)}", {"size_bytes": file.stat().st_size, "sha256": digest})
    return "\n".join(lines) + "\n"
