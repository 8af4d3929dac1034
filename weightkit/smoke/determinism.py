"""Whether a prompt gives the same tokens twice, and whichever way it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from weightkit.generation import Runtime
from weightkit.smoke.verdict import Check

NEW_TOKENS = 8
"""Generated of each prompt, a possible end of text ignored."""

TIE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-14}
"""Two logits closer than this share of the largest are a tie in this dtype: four times its rounding for the narrow
ones; for F32, what sums in another order come to."""

APART = 16
"""So many ties apart, logits of one computation in its two forms are no matter of rounding, whichever token is best."""


@dataclass(frozen=True)
class _Difference:
    """The first token that is not the same.

    Attributes:
        place: which new token.
        gap: by how much the logit of the other token is below the best.
        tie: what rounding explains.
    """

    place: int
    tokens: tuple[int, int]
    gap: float
    tie: float

    def describe(self, how: str) -> str:
        explained = "within" if self.gap <= self.tie else "more than"
        return (
            f"{how}, new token {self.place} is {self.tokens[1]}, not {self.tokens[0]}: their logits differ by "
            f"{self.gap:.3g}, {explained} the {self.tie:.2g} that rounding explains"
        )


@torch.inference_mode()
def check_determinism(runtime: Runtime, prompts: Sequence[Sequence[int]]) -> Check:
    """The check ``deterministic``.

    Each prompt is continued greedily twice, which must give the same tokens. Then prompt and new tokens go through in
    one pass, where attention is computed in its other form, and each position's best token must be the same, but for
    ties within the dtype's rounding (``TIE``), which are told; and no logit may be ``APART`` ties away.
    """
    found = [finding for ids in prompts for finding in _findings(runtime, ids)]
    what = f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}, {NEW_TOKENS} new tokens each: "
    what += "\n".join(said for _, said in found) or "the same twice, and in one pass as token by token"
    figures = {"prompts": len(prompts), "new_tokens": NEW_TOKENS}
    return Check("deterministic", all(harmless for harmless, _ in found), what, figures)


def _findings(runtime: Runtime, ids: Sequence[int]) -> Iterator[tuple[bool, str]]:
    """What is not the same for one prompt: whether rounding explains it, and words for it."""
    dtype = runtime.weights.dtype
    tokens, logits = _greedy(runtime, ids)
    again, logits_again = _greedy(runtime, ids)
    if again != tokens:
        yield False, _first(tokens, again, logits, dtype).describe("a second time")
    elif not torch.equal(logits, logits_again):
        apart = float((logits - logits_again).abs().max())
        yield True, f"a second time, the same tokens by logits that differ by up to {apart:.2g}"
    hidden = runtime.model.hidden_states(torch.tensor([[*ids, *tokens[:-1]]]))
    whole = runtime.model.logits(hidden[0, len(ids) - 1 :]).cpu()
    best = whole.argmax(dim=-1).tolist()
    share = float((whole - logits).abs().max() / logits.abs().max())
    if best != tokens:
        difference = _first(tokens, best, whole, dtype)
        yield difference.gap <= difference.tie, difference.describe("in one pass")
    elif not share <= APART * TIE[dtype]:
        yield False, f"in one pass, logits differ by up to {share:.2g} of the largest"


def _greedy(runtime: Runtime, ids: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """New tokens, and the logits [new, vocab] F32 on the CPU that chose them."""
    cache = runtime.model.new_cache()
    rows = [runtime.prefill(ids, cache)]
    tokens = [int(rows[0].argmax())]
    while len(tokens) < NEW_TOKENS:
        rows.append(runtime.step(tokens[-1], cache, len(tokens)))
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack([row.cpu() for row in rows])


def _first(tokens: Sequence[int], others: Sequence[int], logits: torch.Tensor, dtype: torch.dtype) -> _Difference:
    """The first difference. ``logits`` [new, vocab] are those up to which both agree on what came before."""
    place = next(i for i, pair in enumerate(zip(tokens, others, strict=True)) if pair[0] != pair[1])
    row = logits[place]
    gap = abs(float(row[others[place]] - row[tokens[place]]))
    return _Difference(place + 1, (tokens[place], others[place]), gap, TIE[dtype] * float(row.abs().max()))
