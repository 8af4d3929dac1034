"""pico's questions put to weightkit's own model, whatever the layout and dtype of the checkpoint.

The one module of pico's that stands above the rooms it uses, as a test does: only ``evaluate``'s command line and tests
import it. Prompts of one length go through the model together, so nothing is padded and each answer is what
``weightkit generate`` would have given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from weightkit.compute.engines import DeviceName
from weightkit.errors import TokenizerError
from weightkit.generation import Runtime, Tokenizer
from weightkit.manifests.pico.evaluate import (
    MAX_NEW_TOKENS,
    Answers,
    Perplexity,
    accuracy,
    conversation_text,
    perplexity_of,
    wrong_answers,
)
from weightkit.manifests.pico.questions import Question
from weightkit.manifests.pico.tokenizer import ASSISTANT_ID

#: Sequences that go through the model together.
BATCH = 256


def _tokenizer(runtime: Runtime) -> Tokenizer:
    if runtime.tokenizer is None:
        raise TokenizerError("no tokenizer", where=runtime.root)
    return runtime.tokenizer


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Sequences of one length at a time: their places in ``sequences``, and their ids [batch, length]."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(sequences):
        by_length[len(ids)].append(index)
    for indices in by_length.values():
        for first in range(0, len(indices), BATCH):
            batch = indices[first : first + BATCH]
            yield batch, torch.tensor([list(sequences[index]) for index in batch])


@torch.inference_mode()
def greedy_ids(runtime: Runtime, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy answers to prompts of token ids, each with the token that ended it, or ``MAX_NEW_TOKENS`` long."""
    answers: list[list[int]] = [[] for _ in prompts]
    for places, ids in _batches(prompts):
        cache, step, open_ones = runtime.model.new_cache(), ids, set(places)
        for _ in range(MAX_NEW_TOKENS):
            chosen = runtime.model.logits(runtime.model.hidden_states(step, cache)[:, -1]).argmax(-1).cpu()
            for place, token in zip(places, chosen.tolist(), strict=True):
                if place in open_ones:
                    answers[place].append(token)
                    if token in runtime.eos_ids:
                        open_ones.remove(place)
            if not open_ones:
                break
            step = chosen[:, None]
    return answers


def greedy_answers(runtime: Runtime, questions: Sequence[Question]) -> list[str]:
    """Greedy answers, through the checkpoint's own chat template."""
    tokenizer = _tokenizer(runtime)
    return [
        tokenizer.decode(ids)
        for ids in greedy_ids(runtime, [runtime.encode(question.prompt) for question in questions])
    ]


@torch.inference_mode()
def perplexity(runtime: Runtime, questions: Sequence[Question]) -> Perplexity:
    """Perplexity on each question's conversation, as ``evaluate.perplexity`` measures it."""
    core = _tokenizer(runtime).core
    sums = torch.zeros(4, dtype=torch.float64)
    for _, ids in _batches([core.encode(conversation_text(question)).ids for question in questions]):
        logits = runtime.model(ids)[:, :-1].cpu()
        labels = ids[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).double()
        answer = (ids == ASSISTANT_ID).cumsum(1)[:, :-1] > 0
        sums += torch.stack([loss.sum(), torch.tensor(loss.numel()), loss[answer].sum(), answer.sum()])
    text_loss, text_tokens, answer_loss, answer_tokens = sums.tolist()
    return perplexity_of(text_loss, text_tokens, answer_loss, answer_tokens)


def evaluate_path(
    path: Path,
    questions: Sequence[Question],
    *,
    device: DeviceName = "auto",
    dtype: str | None = None,
) -> Answers:
    """A checkpoint of pico in any layout. Arguments and errors as of ``Runtime``."""
    with Runtime(path, device=device, dtype=dtype) as runtime:
        answers = greedy_answers(runtime, questions)
        return {
            "accuracy": accuracy(questions, answers),
            "perplexity": perplexity(runtime, questions),
            "wrong": wrong_answers(questions, answers),
        }
