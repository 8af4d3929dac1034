"""The feed-forward half of a layer: one gated MLP, or a mixture of many (MoE)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, pad, silu

from weightkit.errors import UnsupportedError
from weightkit.model.parallel import ALONE, Parallel
from weightkit.model.weights import Groups, Held, Observer, Weights, as_groups, project

if TYPE_CHECKING:
    from weightkit.family import Architecture

_NORM_EPS = 1e-20  # the published guard where the chosen experts' scores are all zero

GROUP_TOKENS = 32
"""Experts are multiplied with together where none has more tokens: one tile of the kernels holds them. With more, each
expert's products fill a GPU by themselves."""

GROUP_ROWS = 2048
"""Most rows of all experts together, those of other ranks too, so that what they take stays small: some 0.2 GB at the
widths of DeepSeek-V3."""

ROUTE_TOKENS = 65_536
"""Tokens routed at once: their F32 copy, which the router's product wants, is 1.9 GB at a width of 7168."""


@dataclass(frozen=True)
class Dispatch:
    """Which tokens go to which expert, each expert's tokens in ascending order.

    A *place* is an index into the flattened ids and shares: token * top_k + slot.

    Attributes:
        counts: tokens of each expert, on the host.
    """

    counts: list[int]
    _starts: list[int]
    _places: torch.Tensor
    _rows: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, num_experts: int) -> Dispatch:
        """Sort ``ids`` [tokens, top_k] (integers, no expert twice in a row) by expert. Waits for the device once."""
        by_expert, places = ids.flatten().to(torch.int32).sort(stable=True)
        experts = torch.arange(num_experts + 1, dtype=torch.int32, device=ids.device)
        starts: list[int] = torch.searchsorted(by_expert, experts).tolist()
        counts = [end - start for start, end in pairwise(starts)]
        return cls(counts, starts, places, places // ids.shape[1])

    @property
    def used(self) -> list[int]:
        """The experts that have tokens, ascending."""
        return [expert for expert, count in enumerate(self.counts) if count]

    def rows(self, expert: int) -> torch.Tensor:
        """The tokens of an expert, ascending: [counts[expert]] I64, on the device of the ids."""
        return self._rows[self._starts[expert] : self._starts[expert + 1]]

    def places(self, expert: int) -> torch.Tensor:
        """Where in the flattened shares that of each of ``rows(expert)`` lies: [counts[expert]] I64."""
        return self._places[self._starts[expert] : self._starts[expert + 1]]

    def span(self, experts: range) -> slice:
        """Where the rows of these experts lie among all, one expert's after the other's."""
        return slice(self._starts[experts.start], self._starts[experts.stop])

    def all_rows(self, span: slice) -> torch.Tensor:
        """The tokens of all rows in ``span``."""
        return self._rows[span]

    def all_places(self, span: slice) -> torch.Tensor:
        """Where in the flattened shares those of all rows in ``span`` lie."""
        return self._places[span]

    def by_token(self, tokens: int) -> torch.Tensor:
        """Of each token the places of its rows among all, its experts ascending: [tokens, top_k] I64."""
        return self._rows.sort(stable=True).indices.view(tokens, -1)


class GatedMLP:
    """``down(silu(gate(x)) * up(x))``. ``prefix``: ``model.layers.0.mlp`` or ``model.layers.3.mlp.experts.5``, say.

    With ``parallel`` each rank has a part of the intermediate columns.
    """

    def __init__(
        self, prefix: str, weights: Weights, observe: Observer | None = None, parallel: Parallel = ALONE
    ) -> None:
        self.prefix = prefix
        self.weights = weights
        self.observe = observe
        self.parallel = parallel

    @property
    def names(self) -> list[str]:
        """The weights, in the order of their use."""
        return [f"{self.prefix}.{module}.weight" for module in ("gate_proj", "up_proj", "down_proj")]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., hidden]."""
        return self.parallel.sum(self._project("down_proj", self.inner(x)))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What ``down_proj`` sees of ``x`` [..., hidden]: [..., intermediate]."""
        return silu(self._project("gate_proj", x), inplace=True).mul_(self._project("up_proj", x))

    def holding(self) -> GatedMLP:
        """The same, asking for each weight once and holding it as long as the returned object lives."""
        return GatedMLP(self.prefix, Held(self.weights, self.names), self.observe, self.parallel)

    def _project(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return project(self.weights, f"{self.prefix}.{module}.weight", x, self.observe)


class MoE:
    """Routed and shared experts. Weights of an expert are asked for only when a token is routed to it.

    Among several ranks each has some of the routed experts, and a part of the columns of the shared ones.
    """

    def __init__(
        self,
        arch: Architecture,
        prefix: str,
        weights: Weights,
        observe: Observer | None = None,
        parallel: Parallel = ALONE,
    ) -> None:
        self.arch = arch
        self.prefix = prefix
        self.weights = weights
        self.observe = observe
        self.parallel = parallel

    @property
    def names(self) -> list[str]:
        """The weights that every token needs, in the order of their use."""
        bias = [f"{self.prefix}.gate.e_score_correction_bias"] if self.arch.has_router_bias else []
        shared = self._expert("shared_experts").names if self.arch.n_shared_experts else []
        return [f"{self.prefix}.gate.weight", *bias, *shared]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., hidden]."""
        tokens = x.flatten(0, -2)
        ids, shares = self.route(tokens)
        dispatch = self.dispatch(ids)  # waits for the device, which then has the shared experts to do
        shared = self._expert("shared_experts")(x) if self.arch.n_shared_experts else None
        if self.parallel.alone:
            routed = self.experts(tokens, ids, shares, dispatch).view_as(x)
            return routed if shared is None else routed.add_(shared)
        part = self._own_experts(tokens, ids, shares, dispatch).view_as(x)
        return self.parallel.sum(part if shared is None else part.add_(shared)).to(x.dtype)

    def holding(self) -> MoE:
        """The same, asking once for each of ``names`` and holding it as long as the returned object lives.

        Routed experts' weights are asked for at each use as before.
        """
        held = copy.copy(self)
        held.weights = Held(self.weights, self.names)
        return held

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which experts each token of ``x`` [tokens, hidden] goes to, and how much each counts.

        Logits and all that follows are F32, as published: near ties decide the experts. Tokens go ``ROUTE_TOKENS`` at a
        time, and each by itself; only the product with the router may sum in another order in a block of another size.

        Returns:
            ids [tokens, top_k] I64, shares [tokens, top_k] F32; neither is in any order within a token.
        """
        router = self.weights.get(f"{self.prefix}.gate.weight").float()
        parts = [self._route(linear(rows.float(), router)) for rows in x.split(ROUTE_TOKENS)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([ids for ids, _ in parts]), torch.cat([shares for _, shares in parts])

    def dispatch(self, ids: torch.Tensor) -> Dispatch:
        """The tokens of each expert, from the ``ids`` [tokens, top_k] that ``route`` gave."""
        return Dispatch.of(ids, self.arch.n_routed_experts)

    def expert(self, number: int) -> GatedMLP:
        """A routed expert, [rows, hidden] to [rows, hidden]."""
        return self._expert(f"experts.{number}")

    def experts(
        self, x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, dispatch: Dispatch | None = None
    ) -> torch.Tensor:
        """The routed experts' outputs, weighted and summed in F32: ``x``'s shape [tokens, hidden] and dtype.

        Among several ranks, the sum over this rank's experts alone.

        A token's outputs are added in ascending order of its experts, so that the sum is the same in every run. The F32
        sums take 4 bytes a number: for more tokens than fit, call this for a block of them at a time.

        Args:
            x: [tokens, hidden].
            ids, shares: as by ``route``.
            dispatch: that of ``ids``, if it is known already.
        """
        return self._own_experts(x, ids, shares, self.dispatch(ids) if dispatch is None else dispatch).to(x.dtype)

    def _own_experts(
        self, x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, dispatch: Dispatch
    ) -> torch.Tensor:
        """The F32 sum of ``experts``, [tokens, hidden], over those of this rank."""
        own = self.parallel.share_of(self.arch.n_routed_experts)
        together = self._together(dispatch, own)
        if together is not None:
            return self._grouped_experts(together, x, shares, dispatch, own)
        chosen = {number: self.expert(number) for number in dispatch.used if number in own}
        self.weights.prefetch([name for expert in chosen.values() for name in expert.names])
        y = torch.zeros_like(x, dtype=torch.float32)
        flat = shares.flatten()
        for number, expert in chosen.items():
            rows = dispatch.rows(number)
            output = expert(x.index_select(0, rows)) * flat.index_select(0, dispatch.places(number))[:, None]
            y.index_add_(0, rows, output)  # no token comes twice, as its experts differ: nothing races
        return y

    def _together(self, dispatch: Dispatch, own: range) -> Groups | None:
        """What multiplies with the chosen of these experts at once, if it can, and if none has many tokens."""
        weights, most = as_groups(self.weights), max(dispatch.counts[own.start : own.stop], default=0)
        few = 0 < most <= GROUP_TOKENS and sum(dispatch.counts) <= GROUP_ROWS
        if self.observe is not None or not few or weights is None:
            return None
        names = [name for number in own if dispatch.counts[number] for name in self.expert(number).names]
        return weights if weights.takes_groups(names) else None

    def _grouped_experts(
        self, weights: Groups, x: torch.Tensor, shares: torch.Tensor, dispatch: Dispatch, own: range
    ) -> torch.Tensor:
        """``_own_experts`` by products of many experts at once: gates and ups, then downs."""
        numbers = [number for number in own if dispatch.counts[number]]
        counts = [dispatch.counts[number] for number in numbers]
        starts = [0, *accumulate(counts)][:-1]
        gates, ups, downs = (list(names) for names in zip(*(self.expert(n).names for n in numbers), strict=True))
        self.weights.prefetch([*gates, *ups, *downs])
        span = dispatch.span(own)
        rows = x.index_select(0, dispatch.all_rows(span))
        gate, up = weights.grouped([*gates, *ups], rows, counts * 2, starts * 2).chunk(2)
        outputs = weights.grouped(downs, silu(gate, inplace=True).mul_(up), counts, starts)
        parts = outputs * shares.flatten().index_select(0, dispatch.all_places(span))[:, None]
        return self._sum_by_token(parts, span, len(x), dispatch)

    def _sum_by_token(self, parts: torch.Tensor, span: slice, tokens: int, dispatch: Dispatch) -> torch.Tensor:
        """The sums [tokens, hidden] of the rows ``parts`` in ``span`` F32, in ascending order of experts."""
        total = dispatch.all_rows(slice(None)).numel()
        if len(parts) < total:  # the rest are other ranks' rows
            parts = pad(parts, (0, 0, span.start, total - span.stop))
        if tokens > 1:
            parts = parts.index_select(0, dispatch.by_token(tokens).flatten())
        first, *others = parts.view(tokens, -1, parts.shape[1]).unbind(1)
        y = first + 0.0  # as a sum that begins with 0
        for other in others:
            y += other
        return y

    def _route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and shares by the router's ``logits`` [tokens, experts] F32."""
        arch = self.arch
        scores = logits.sigmoid() if arch.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        ids = self._choose(scores)
        shares = scores.gather(1, ids)
        if arch.norm_topk_prob and arch.num_experts_per_tok > 1:
            shares = shares / (shares.sum(dim=-1, keepdim=True) + _NORM_EPS)
            if arch.scoring_func == "softmax":
                return ids, shares  # the published V2 code scales only shares that it did not normalize
        return ids, shares * arch.routed_scaling_factor

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The ids [tokens, top_k] that the config's ``topk_method`` picks by ``scores`` [tokens, experts]."""
        arch = self.arch
        if arch.topk_method == "greedy":
            eligible = scores
        elif arch.topk_method == "group_limited_greedy":
            eligible = self._limit_groups(scores, best_of_group=1, excluded=0.0)
        elif arch.topk_method == "noaux_tc":
            # the bias balances the load of experts: it decides who is chosen, not how much they count
            biased = scores + self.weights.get(f"{self.prefix}.gate.e_score_correction_bias").float()
            eligible = self._limit_groups(biased, best_of_group=2, excluded=float("-inf"))
        else:
            expected = "greedy, group_limited_greedy or noaux_tc"
            raise UnsupportedError("unknown routing", where="topk_method", expected=expected, found=arch.topk_method)
        return eligible.topk(arch.num_experts_per_tok, dim=-1, sorted=False).indices

    def _limit_groups(self, scores: torch.Tensor, best_of_group: int, excluded: float) -> torch.Tensor:
        """``scores`` [tokens, experts] with ``excluded`` outside each token's ``topk_group`` best groups.

        A group's worth is the sum of its ``best_of_group`` highest scores.
        """
        groups = scores.view(len(scores), self.arch.n_group, -1)
        worth = groups.topk(min(best_of_group, groups.shape[-1]), dim=-1).values.sum(dim=-1)
        best = worth.topk(self.arch.topk_group, dim=-1, sorted=False).indices
        outside = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
        return groups.masked_fill(outside[..., None], excluded).view_as(scores)

    def _expert(self, module: str) -> GatedMLP:
        return GatedMLP(f"{self.prefix}.{module}", self.weights, self.observe)
