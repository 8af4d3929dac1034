"""What a generation made and took, and the line that a terminal shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from weightkit.model.stores import CacheUse
from weightkit.units import human_bytes, human_seconds

StoppedBy = Literal["eos", "length"]


@dataclass(frozen=True)
class Generation:
    """What was generated, and what it took.

    Attributes:
        text: without special tokens.
        token_ids: all new tokens, the end-of-text token included.
        prompt_ids: the prompt's tokens.
        stopped_by: ``eos``, or ``length`` for ``max_new_tokens`` or the model's context.
        prefill_s: from the start to the first new token, reading of weights included; of prompts that share a pass, the
            pass's.
        decode_s: from the first new token to the last.
        bytes_read: from the checkpoint's files by all ranks, since the runtime was opened until the end of this
            generation.
        device: ``cpu`` or ``cuda``.
        dtype: in which was computed: ``bfloat16``, ``float16`` or ``float32``.
        cache: where weights of routed experts were found during this generation; of prompts that share a pass, for all;
            of ranks, on this one.
        ranks: processes that shared the work.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    stopped_by: StoppedBy
    prefill_s: float
    decode_s: float
    bytes_read: int
    device: str
    dtype: str
    cache: CacheUse = field(default_factory=CacheUse)
    ranks: int = 1

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens a second, the first left out, which is the prompt's; None for a single token."""
        return (len(self.token_ids) - 1) / self.decode_s if len(self.token_ids) > 1 and self.decode_s > 0 else None

    def render(self) -> str:
        """One line for a terminal: tokens, rates, bytes read, cache hits."""
        tokens = f"{len(self.prompt_ids)} tokens in, {len(self.token_ids)} out (stopped by {self.stopped_by})"
        took = f"first token after {human_seconds(self.prefill_s)}{render_rate(self.tokens_per_s)}"
        read = f"{human_bytes(self.bytes_read)} read{render_hits(self.cache)}"
        return f"[{tokens}; {took}; {read}; {render_place(self)}]"


def render_rate(tokens_per_s: float | None) -> str:
    """``, 4.2 tokens/s after it``, or seconds a token where that is longer than one."""
    if tokens_per_s is None:
        return ""
    return (
        f", {tokens_per_s:.1f} tokens/s after it" if tokens_per_s >= 1 else f", {1 / tokens_per_s:.1f} s/token after it"
    )


def render_hits(cache: CacheUse) -> str:
    """The share of experts' weights that were in a cache; nothing where there were none."""
    asked = cache.device_hits + cache.host_hits + cache.misses
    if not asked:
        return ""
    shares = [f"{cache.device_hits / asked:.0%} of experts on the device"]
    if cache.host_hits:
        shares.append(f"{cache.host_hits / asked:.0%} in host memory")
    return f" ({', '.join(shares)})"


def render_place(result: Generation) -> str:
    """``bfloat16 on cuda, 8 ranks``."""
    shared = "" if result.ranks == 1 else f", {result.ranks} ranks"
    return f"{result.dtype} on {result.device}{shared}"


def render_many(results: Sequence[Generation]) -> str:
    """One line for a terminal on prompts that shared passes."""
    first, last = results[0], results[-1]
    tokens = f"{len(results)} prompts, {sum(len(result.prompt_ids) for result in results):,} tokens in"
    made = f"{sum(len(result.token_ids) for result in results):,} out"
    slowest = max(results, key=lambda result: len(result.token_ids))
    took = f"first tokens after {human_seconds(first.prefill_s)}{render_rate(slowest.tokens_per_s)} for each prompt"
    read = f"{human_bytes(last.bytes_read)} read{render_hits(last.cache)}"
    return f"[{tokens}, {made}; {took}; {read}; {render_place(last)}]"
