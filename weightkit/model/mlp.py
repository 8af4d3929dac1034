"""The feed-forward half of a layer: one gated MLP, or a mixture of many (MoE)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, silu

from weightkit.errors import UnsupportedError
from weightkit.model.weights import Observer, Weights, project

if TYPE_CHECKING:
    from weightkit.family import Architecture

_NORM_EPS = 1e-20  # the published guard where the chosen experts' scores are all zero


class GatedMLP:
    """``down(silu(gate(x)) * up(x))``. ``prefix``: ``model.layers.0.mlp`` or ``model.layers.3.mlp.experts.5``, say."""

    def __init__(self, prefix: str, weights: Weights, observe: Observer | None = None) -> None:
        self.prefix = prefix
        self.weights = weights
        self.observe = observe

    @property
    def names(self) -> list[str]:
        """The weights, in the order of their use."""
        return [f"{self.prefix}.{module}.weight" for module in ("gate_proj", "up_proj", "down_proj")]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., hidden]."""
        return self._project("down_proj", silu(self._project("gate_proj", x)) * self._project("up_proj", x))

    def _project(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return project(self.weights, f"{self.prefix}.{module}.weight", x, self.observe)


class MoE:
    """Routed and shared experts. Weights of an expert are asked for only when a token is routed to it."""

    def __init__(self, arch: Architecture, prefix: str, weights: Weights, observe: Observer | None = None) -> None:
        self.arch = arch
        self.prefix = prefix
        self.weights = weights
        self.observe = observe

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
        shared = self._expert("shared_experts")(x) if self.arch.n_shared_experts else None
        routed = self.experts(tokens, ids, shares).view_as(x)
        return routed if shared is None else routed + shared

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which experts each token of ``x`` [tokens, hidden] goes to, and how much each counts.

        Logits and all that follows are F32, as published: near ties decide the experts.

        Returns:
            ids [tokens, top_k] I64, shares [tokens, top_k] F32; neither is in any order within a token.
        """
        arch = self.arch
        logits = linear(x.float(), self.weights.get(f"{self.prefix}.gate.weight").float())
        scores = logits.sigmoid() if arch.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        ids = self._choose(scores)
        shares = scores.gather(1, ids)
        if arch.norm_topk_prob and arch.num_experts_per_tok > 1:
            shares = shares / (shares.sum(dim=-1, keepdim=True) + _NORM_EPS)
            if arch.scoring_func == "softmax":
                return ids, shares  # the published V2 code scales only shares that it did not normalize
        return ids, shares * arch.routed_scaling_factor

    def experts(self, x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The routed experts' outputs, weighted and summed in F32: ``x``'s shape [tokens, hidden] and dtype."""
        chosen = {expert: self._expert(f"experts.{expert}") for expert in sorted(set(ids.flatten().tolist()))}
        self.weights.prefetch([name for expert in chosen.values() for name in expert.names])
        y = torch.zeros_like(x, dtype=torch.float32)
        for expert, mlp in chosen.items():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            output = mlp(x[token])
            y[token] += output * shares[token, slot, None]  # no token comes twice: its experts differ
        return y.to(x.dtype)

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
