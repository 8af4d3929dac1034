"""Training data: conversations as token ids, packed into rows by worker processes. No torch, so workers start fast."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing.context import SpawnProcess
from queue import Empty
from random import Random
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from weightkit.manifests.pico.questions import draw
from weightkit.manifests.pico.tokenizer import ASSISTANT, BOS, BOS_ID, EOS, PAD_ID, USER

#: Tokens a row; about five conversations.
ROW_LENGTH = 128
#: Rows a worker hands over at once.
CHUNK_ROWS = 2048
#: Conversations of one turn; the others have two or three.
SINGLE_TURN = 0.85

Rows = NDArray[np.uint16]


class _Queue(Protocol):
    def put(self, rows: Rows) -> None: ...

    def get(self, block: bool = ..., timeout: float | None = ...) -> Rows: ...


def conversation(rng: Random) -> str:
    """One conversation of training questions, with its special tokens."""
    turns = 1 if rng.random() < SINGLE_TURN else rng.randint(2, 3)
    text = BOS
    for _ in range(turns):
        question = draw("train", rng)
        text += f"{USER}{question.prompt}{ASSISTANT}{question.answer}{EOS}"
    return text


def _conversations(tokenizer: Tokenizer, rng: Random, batch: int = 512) -> Iterator[list[int]]:
    """Token ids of conversations, endlessly. Encoded many at a time: a call costs more than a conversation."""
    while True:
        ids: list[int] = tokenizer.encode("".join(conversation(rng) for _ in range(batch))).ids
        starts = [index for index, token in enumerate(ids) if token == BOS_ID] + [len(ids)]
        for start, end in pairwise(starts):
            if end - start <= ROW_LENGTH:
                yield ids[start:end]


def packed_rows(tokenizer: Tokenizer, seed: int, open_rows: int = 8) -> Iterator[list[int]]:
    """Rows of exactly ``ROW_LENGTH`` ids, padded at the end: a conversation goes into the fullest row with room."""
    rows: list[list[int]] = []
    for ids in _conversations(tokenizer, Random(seed)):
        fitting = [row for row in rows if len(row) + len(ids) <= ROW_LENGTH]
        if fitting:
            max(fitting, key=len).extend(ids)
        else:
            rows.append(list(ids))
        if len(rows) > open_rows:
            fullest = max(range(len(rows)), key=lambda index: len(rows[index]))
            row = rows.pop(fullest)
            yield row + [PAD_ID] * (ROW_LENGTH - len(row))


def chunk(rows: Iterator[list[int]], count: int) -> Rows:
    """The next ``count`` rows as an array [count, ROW_LENGTH] U16."""
    return np.array([next(rows) for _ in range(count)], dtype=np.uint16)


def _work(tokenizer_json: str, seed: int, queue: _Queue) -> None:
    rows = packed_rows(Tokenizer.from_str(tokenizer_json), seed)
    while True:
        queue.put(chunk(rows, CHUNK_ROWS))


class Workers:
    """Processes that pack rows ahead of training, each from its own seed. Use as a context manager."""

    def __init__(self, tokenizer: Tokenizer, seed: int, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._queue: _Queue = context.Queue(maxsize=2 * count)
        self._processes: list[SpawnProcess] = [
            context.Process(target=_work, args=(tokenizer.to_str(), seed * 1000 + index, self._queue), daemon=True)
            for index in range(count)
        ]

    def __enter__(self) -> Workers:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=10)

    def wait(self, timeout_s: float = 120) -> Rows:
        """The next chunk; blocks.

        Raises:
            RuntimeError: no worker gave one in time.
        """
        try:
            return self._queue.get(timeout=timeout_s)
        except Empty:
            codes = [process.exitcode for process in self._processes]
            raise RuntimeError(
                f"no training data after {timeout_s:.0f} s; exit codes of the workers: {codes}"
            ) from None

    def ready(self) -> Rows | None:
        """A chunk if one is ready."""
        try:
            return self._queue.get(block=False)
        except Empty:
            return None
