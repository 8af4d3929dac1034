"""Text to calibrate pico with: ``python -m weightkit.manifests.pico.calibration`` writes ``calibration.jsonl``.

Conversations as in training, of training questions alone: nothing that accuracy or perplexity is measured on is among
them. The file is committed, so that a quantized pico can be made again whatever becomes of the program that writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType

from weightkit.manifests.pico.packing import ROW_LENGTH, SINGLE_TURN
from weightkit.manifests.pico.questions import draw

PATH = Path(__file__).parent / "calibration.jsonl"
#: Far from those of training's workers, so that these are draws of their own.
SEED = 4_000_000
CONVERSATIONS = 2_500
#: What the manifest says. No row was longer in training.
MANIFEST_ENTRY: Mapping[str, object] = MappingProxyType({"file": PATH.name, "samples": 512, "seq_len": ROW_LENGTH})

Message = dict[str, str]


def conversations(count: int = CONVERSATIONS, seed: int = SEED) -> Iterator[list[Message]]:
    """Conversations of training questions, with as many turns as in training; the same for the same seed."""
    rng = Random(seed)
    for _ in range(count):
        turns = 1 if rng.random() < SINGLE_TURN else rng.randint(2, 3)
        yield [message for _ in range(turns) for message in _turn(rng)]


def _turn(rng: Random) -> Iterator[Message]:
    question = draw("train", rng)
    yield {"role": "user", "content": question.prompt}
    yield {"role": "assistant", "content": question.answer}


def text() -> str:
    """The file's text: a conversation a line."""
    lines = (json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations())
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
