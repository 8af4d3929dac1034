"""The tokens that a checkpoint is run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weightkit.errors import GenerationError
from weightkit.generation import Tokenizer
from weightkit.manifests import passage
from weightkit.smoke.prompts import Prompt

RANDOM_TOKENS = 512
"""Without a tokenizer there is no text: so many token ids are drawn instead, always the same."""


@dataclass(frozen=True)
class Material:
    """One sequence of tokens: the passage, then each prompt with its answer.

    One sequence, because each pass over a checkpoint that does not fit in memory reads it from its files.

    Attributes:
        ids: the tokens.
        passage_tokens: how many of them, from the first on, are the passage's; 0 where the ids were drawn.
        what: for people.
    """

    ids: tuple[int, ...]
    passage_tokens: int
    what: str

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Prompt],
        vocab_size: int,
        most: int,
        passage_most: int | None = None,
    ) -> Material:
        """The material for a model.

        Args:
            tokenizer: the checkpoint's; None where it has none.
            prompts: put into the chat template where there is one.
            vocab_size: the model's.
            most: tokens that the model takes.
            passage_most: tokens of the passage to take; None for all.

        Raises:
            TokenizerError: a chat template that fails.
            GenerationError: the tokenizer gives ids outside the vocabulary.
        """
        if tokenizer is None:
            drawn = torch.randint(vocab_size, (min(RANDOM_TOKENS, most),), generator=torch.Generator().manual_seed(0))
            return cls(tuple(drawn.tolist()), 0, f"{len(drawn)} random tokens")
        ids = tokenizer.encode(passage())[:passage_most]
        passage_tokens = min(len(ids), most)
        for prompt in prompts:
            ids += prompt_ids(tokenizer, prompt)
            ids += tokenizer.core.encode(prompt.expected or "", add_special_tokens=False).ids
        ids = ids[:most]
        outside = next((token for token in ids if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise GenerationError(
                "a token id outside the vocabulary: the tokenizer does not belong to these weights",
                where=tokenizer.where,
                expected=f"0 to {vocab_size - 1}",
                found=outside,
                fix="Take tokenizer.json from the repository that the weights come from.",
            )
        what = f"the passage ({passage_tokens:,} tokens)"
        if len(ids) > passage_tokens:
            what += f" and {len(prompts)} prompts ({len(ids) - passage_tokens:,})"
        return cls(tuple(ids), passage_tokens, what)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """A prompt's tokens, as a user's message where there is a chat template."""
    if tokenizer.template is None:
        return tokenizer.encode(prompt.text)
    return tokenizer.encode_chat([{"role": "user", "content": prompt.text}])
