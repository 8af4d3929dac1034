"""How well pico answers: exact-match accuracy on held-out questions, and perplexity on their text.

``python -m weightkit.manifests.pico.evaluate PATH`` evaluates a checkpoint of pico in any layout with weightkit's own
runtime; ``--runtime training`` a published one with the network that was trained, which knows nothing of weightkit's
model: the published figures are from it. To evaluate something else, give :func:`accuracy` its answers to
:func:`evaluation_questions`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from weightkit.manifests.pico.export import load
from weightkit.manifests.pico.network import Network, causal_mask
from weightkit.manifests.pico.questions import Question, held_out
from weightkit.manifests.pico.tokenizer import ASSISTANT_ID, EOS, EOS_ID, PAD_ID, prompt_text

#: The published figures are for these questions.
SEED = 2026
PER_CATEGORY_AND_LANGUAGE = 200
MAX_NEW_TOKENS = 24


class Accuracy(TypedDict):
    """Shares of right answers, 0 to 1."""

    overall: float
    questions: int
    by_category: dict[str, float]
    by_language: dict[str, float]
    by_kind: dict[str, float]


class Perplexity(TypedDict):
    """exp of the mean negative log-likelihood a token."""

    text: float
    answers: float
    tokens: int


class Answers(TypedDict):
    """What one run over the questions gives.

    ``wrong`` has the first wrong answers, each with ``prompt``, ``expected`` and ``found``.
    """

    accuracy: Accuracy
    perplexity: Perplexity
    wrong: list[dict[str, str]]


class Evaluation(Answers):
    """With the MTP layer: the share of answer tokens that its best guess gets right two tokens ahead."""

    mtp_accuracy: float


def evaluation_questions(per_category_and_language: int = PER_CATEGORY_AND_LANGUAGE) -> list[Question]:
    """The held-out questions that the published figures are for."""
    return held_out(SEED, per_category_and_language)


def _shares(groups: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    counts: dict[str, list[int]] = {}
    for group, one in zip(groups, right, strict=True):
        tally = counts.setdefault(group, [0, 0])
        tally[0] += one
        tally[1] += 1
    return {group: round(hits / total, 5) for group, (hits, total) in counts.items()}


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> Accuracy:
    """Exact match of ``answers`` with the questions' own; surrounding white space does not count."""
    right = [answer.strip() == question.answer for question, answer in zip(questions, answers, strict=True)]
    return {
        "overall": round(sum(right) / len(right), 5),
        "questions": len(right),
        "by_category": _shares([question.category for question in questions], right),
        "by_language": _shares([question.language for question in questions], right),
        "by_kind": _shares([f"{question.category}: {question.kind}" for question in questions], right),
    }


def wrong_answers(questions: Sequence[Question], answers: Sequence[str], most: int = 60) -> list[dict[str, str]]:
    """The first ``most`` wrong answers, each with ``prompt``, ``expected`` and ``found``."""
    pairs = zip(questions, answers, strict=True)
    wrong = [
        {"prompt": question.prompt, "expected": question.answer, "found": answer}
        for question, answer in pairs
        if answer.strip() != question.answer
    ]
    return wrong[:most]


def conversation_text(question: Question) -> str:
    """The whole conversation as the chat template writes it: what perplexity is measured on."""
    return f"{prompt_text(question.prompt)}{question.answer}{EOS}"


def perplexity_of(text_loss: float, text_tokens: float, answer_loss: float, answer_tokens: float) -> Perplexity:
    """From sums of negative log-likelihoods, in nats: of all tokens after the first, and of answers with their end."""
    return {
        "text": round(math.exp(text_loss / text_tokens), 5),
        "answers": round(math.exp(answer_loss / answer_tokens), 5),
        "tokens": int(text_tokens),
    }


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Sequences as one tensor [count, longest], padded at the end."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[PAD_ID] * (longest - len(ids))] for ids in sequences], device=device)


@torch.no_grad()
def greedy_answers(
    network: Network, tokenizer: Tokenizer, prompts: Sequence[str], dtype: torch.dtype, batch: int = 512
) -> list[str]:
    """Greedy answers to chat prompts, the whole sequence computed anew for each token: slow, and a check on caches."""
    device = network.embed_tokens.device
    sequences: list[list[int]] = [tokenizer.encode(prompt).ids for prompt in prompts]
    starts = [len(ids) for ids in sequences]
    # Neighbours in length share a batch, so that little is padding.
    order = sorted(range(len(prompts)), key=starts.__getitem__)
    for first in range(0, len(order), batch):
        open_ones = order[first : first + batch]
        for _ in range(MAX_NEW_TOKENS):
            ids = _padded([sequences[index] for index in open_ones], device)
            last = torch.tensor([len(sequences[index]) - 1 for index in open_ones], device=device)
            hidden = network(ids, causal_mask(torch.zeros_like(ids)), dtype, False).hidden
            chosen = network.logits(hidden[torch.arange(len(open_ones), device=device), last]).argmax(-1).tolist()
            for index, token in zip(open_ones, chosen, strict=True):
                sequences[index].append(token)
            open_ones = [index for index in open_ones if sequences[index][-1] != EOS_ID]
            if not open_ones:
                break
    answers = [ids[start:] for ids, start in zip(sequences, starts, strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


@torch.no_grad()
def perplexity(
    network: Network, tokenizer: Tokenizer, questions: Sequence[Question], dtype: torch.dtype, batch: int = 512
) -> tuple[Perplexity, float]:
    """Perplexity on each question's conversation, and the MTP layer's accuracy.

    Returns:
        The perplexity (of all tokens after the first, and of the answers with their end token), and the share of answer
        tokens that the MTP layer's best guess gets right two tokens ahead.
    """
    device = network.embed_tokens.device
    sequences = sorted((tokenizer.encode(conversation_text(question)).ids for question in questions), key=len)
    sums = torch.zeros(6, dtype=torch.float64)
    for first in range(0, len(sequences), batch):
        ids = _padded(sequences[first : first + batch], device)
        out = network(ids, causal_mask(torch.zeros_like(ids)), dtype, True)
        labels = ids[:, 1:]
        valid = labels != PAD_ID
        answer = ((ids == ASSISTANT_ID).cumsum(1)[:, :-1] > 0) & valid
        loss = F.cross_entropy(
            network.logits(out.hidden)[:, :-1].flatten(0, 1), labels.flatten(), reduction="none"
        ).view_as(labels)
        guesses = network.logits(out.mtp_hidden)[:, :-2].argmax(-1)
        ahead = answer[:, 1:]
        hits = (guesses == ids[:, 2:]) & ahead
        parts = (loss[valid].sum(), valid.sum(), loss[answer].sum(), answer.sum(), hits.sum(), ahead.sum())
        sums += torch.stack([part.double().cpu() for part in parts])
    text_loss, text_count, answer_loss, answer_count, hit_count, ahead_count = sums.tolist()
    result = perplexity_of(text_loss, text_count, answer_loss, answer_count)
    return result, round(hit_count / ahead_count, 5)


def evaluate(network: Network, tokenizer: Tokenizer, questions: Sequence[Question], dtype: torch.dtype) -> Evaluation:
    """Accuracy, perplexity, MTP accuracy and the first wrong answers."""
    answers = greedy_answers(network, tokenizer, [prompt_text(question.prompt) for question in questions], dtype)
    text, mtp = perplexity(network, tokenizer, questions, dtype)
    return {
        "accuracy": accuracy(questions, answers),
        "perplexity": text,
        "mtp_accuracy": mtp,
        "wrong": wrong_answers(questions, answers),
    }


def evaluate_checkpoint(folder: Path, questions: Sequence[Question], device: torch.device) -> dict[str, Evaluation]:
    """A published checkpoint evaluated twice.

    ``fp8``: its values as stored, F32 arithmetic; ``bf16``: its values cast to BF16, BF16 arithmetic.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fp8 = load(folder, through_bf16=False).to(device).eval()
    bf16 = load(folder, through_bf16=True).to(device).eval()
    return {
        "fp8": evaluate(fp8, tokenizer, questions, torch.float32),
        "bf16": evaluate(bf16, tokenizer, questions, torch.bfloat16),
    }


def main() -> None:
    """Prints the evaluation of a checkpoint as JSON."""
    parser = argparse.ArgumentParser(description="Evaluate a pico checkpoint on held-out questions.")
    parser.add_argument("path", type=Path, nargs="?", default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--runtime", choices=("weightkit", "training"), default="weightkit")
    parser.add_argument("--dtype", choices=("bf16", "f16", "f32"), help="to compute in, of weightkit's runtime")
    parser.add_argument(
        "--questions", type=int, default=PER_CATEGORY_AND_LANGUAGE, help="of each category and language"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    questions = evaluation_questions(given.questions)
    result: Mapping[str, object]
    if given.runtime == "training":
        result = evaluate_checkpoint(given.path, questions, torch.device(given.device))
    else:
        # Here alone, so that training needs nothing that stands above it.
        from weightkit.manifests.pico.evaluate_runtime import evaluate_path

        result = evaluate_path(given.path, questions, device=given.device, dtype=given.dtype)
    print(json.dumps(result, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
