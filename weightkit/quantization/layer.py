"""One layer, quantized: what its linear maps see is collected, solved and replaced, in the order of the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch

from weightkit.errors import QuantizationError
from weightkit.family import expert_of
from weightkit.model import Dispatch, GatedMLP, Layer, MoE, Rotation, TensorWeights
from weightkit.quantization.activations import Activations
from weightkit.quantization.clock import Clock
from weightkit.quantization.layer_weights import LayerWeights
from weightkit.quantization.outbox import Outbox
from weightkit.quantization.packed import Packed, flat, flat_bytes, unflat
from weightkit.quantization.report import MatrixReport
from weightkit.quantization.solver import FIND, Fate, Hessian, Solver
from weightkit.ranks.ranks import Ranks

#: Inputs of an expert that are gathered at once, and whose products are summed at once.
CHUNK_TOKENS = 65_536
#: Up to so many inputs of an expert are held between its first two matrices and the third; more are gathered again.
HELD_TOKENS = 2 * CHUNK_TOKENS

Chunks = Callable[[], Iterator[torch.Tensor]]
"""Inputs [n, width] in their order, some at a time; may be called again."""

ATTENTION_GROUPS = (("q_proj", "q_a_proj", "kv_a_proj_with_mqa"), ("q_b_proj",), ("kv_b_proj",), ("o_proj",))
"""Linear maps of the attention in the order of their use; those side by side share their input."""


class _Seen(Exception):  # noqa: N818 - no error: a forward pass has gone as far as it had to
    pass


@dataclass
class LayerQuantizer:
    """Quantizes one layer of a model whose earlier layers are quantized already.

    Attributes:
        weights: the layer's; what is quantized is replaced there.
        exact: reads a weight [N, K] by its published name in F32.
        upcoming: told which weights ``exact`` will be asked for, in their order.
        shapes: published name to shape [N, K] of the weights to quantize.
        tokens_by_expert: calibration tokens of each routed expert, once they are known.
    """

    weights: LayerWeights
    exact: Callable[[str], torch.Tensor]
    upcoming: Callable[[Sequence[str]], None]
    shapes: Mapping[str, tuple[int, int]]
    solver: Solver
    ranks: Ranks
    clock: Clock
    outbox: Outbox
    tokens_by_expert: tuple[int, ...] = ()
    _done: list[tuple[str, int, Fate]] = field(default_factory=list)
    _watch: Callable[[str, torch.Tensor], None] | None = None

    def observe(self, name: str, x: torch.Tensor) -> None:
        """The layer's observer."""
        if self._watch is not None:
            self._watch(name, x)

    def reports(self, index: int) -> list[MatrixReport]:
        """What became of each matrix that this rank solved; waits for the device."""
        errors = torch.stack([fate.errors for *_, fate in self._done]).tolist() if self._done else []
        return [
            MatrixReport(
                name=name.removesuffix(".weight"),
                layer=index,
                expert=expert_of(name),
                shape=self.shapes[name],
                tokens=tokens,
                method="rtn" if fate.damping is None else "gptq",
                error=error,
                rounding_error=rounding,
                damping=fate.damping,
                retries=fate.retries,
                note=fate.note,
            )
            for (name, tokens, fate), (error, rounding) in zip(self._done, errors, strict=True)
        ]

    def attention(self, layer: Layer, activations: Activations, rotation: Rotation) -> None:
        """Quantize what is to be in the attention, and replace the activations by those after it."""

        def passes() -> Iterator[Callable[[], object]]:
            for _, batch in activations.batches():
                for part in layer.attention.slices(batch):
                    yield lambda states=batch[part]: layer.attend(states, rotation)  # type: ignore[misc]

        for group in ATTENTION_GROUPS:
            names = [f"{layer.attention.prefix}.{module}.weight" for module in group]
            wanted = [name for name in names if name in self.shapes]
            if wanted:
                self._upcoming_together(wanted)
                inputs = partial(self._seen_by, wanted[0], passes)
                self._replace(wanted, self._linears(wanted, inputs, activations.total_tokens, together=True))
        with self.clock.stage("attention"):
            for place, batch in activations.batches():
                layer.attend(batch, rotation, out=batch)
                activations.put(place, batch)

    def feed_forward(self, layer: Layer, activations: Activations, *, forward: bool = True) -> None:
        """Quantize what is to be in the MLP or the experts; then, ``forward``, take the activations through it."""

        def inputs() -> Iterator[torch.Tensor]:
            for _, batch in activations.batches():
                yield layer.mlp_input(batch.flatten(0, 1))

        mlp: GatedMLP | MoE = layer.mlp
        if isinstance(mlp, MoE):
            if mlp.expert(0).names[0] in self.shapes:
                self._experts(layer, mlp, activations, inputs)
            mlp = GatedMLP(f"{mlp.prefix}.shared_experts", self.weights)
        if mlp.names[0] in self.shapes:
            self._upcoming_together(mlp.names)
            self._replace(mlp.names, self._gated(mlp, inputs, activations.total_tokens, together=True))
        if forward:
            with self.clock.stage("forward"):
                largest = []
                for place, batch in activations.batches():
                    layer.feed_forward(batch, batch)
                    activations.put(place, batch)
                    largest.append(torch.linalg.vector_norm(batch, float("inf")))
            if not bool(torch.isfinite(torch.stack(largest)).all()):
                raise QuantizationError("the states after this layer hold NaN or Inf", where=layer.prefix, fix=FIND)

    def round(self) -> None:
        """Round each weight to nearest, without any input."""
        self.upcoming(list(self.shapes))
        for name in self.shapes:
            self._replace([name], self._solve([name], None, 0))

    def _upcoming_together(self, names: Sequence[str]) -> None:
        """Of weights that all ranks' inputs are for, which the first rank solves."""
        if self.ranks.rank == 0:
            self.upcoming(names)

    def _seen_by(self, name: str, passes: Callable[[], Iterator[Callable[[], object]]]) -> Iterator[torch.Tensor]:
        """What each pass through the layer brings to ``name``; none goes further than that."""
        seen: list[torch.Tensor] = []

        def watch(other: str, x: torch.Tensor) -> None:
            if other == name:
                seen.append(x.flatten(0, -2))
                raise _Seen

        for go in passes():
            self._watch = watch
            try:
                go()
            except _Seen:
                pass
            finally:
                self._watch = None
            yield seen.pop()

    def _experts(self, layer: Layer, moe: MoE, activations: Activations, inputs: Chunks) -> None:
        """Quantize the routed experts: they go round the ranks, each rank gets all inputs of its own."""
        with self.clock.stage("route"):
            ids = torch.cat([moe.route(x)[0] for x in inputs()])
            dispatch = moe.dispatch(ids)
        counts = self.ranks.everybodys(dispatch.counts)
        self.tokens_by_expert = tuple(map(sum, zip(*counts, strict=True)))
        size, experts = self.ranks.size, len(dispatch.counts)
        self.upcoming([name for number in range(self.ranks.rank, experts, size) for name in moe.expert(number).names])
        for first in range(0, experts, size):
            chosen = range(first, min(first + size, experts))
            chunks = self._inputs_of(layer, dispatch, activations, chosen, counts)
            mine, packed = first + self.ranks.rank, None
            if mine in chosen:
                packed = self._gated(moe.expert(mine), chunks, self.tokens_by_expert[mine], together=False)
            else:  # the others are sent what this rank has for them, as often as ``_gated`` asks for it
                for _ in range(2):
                    list(chunks())
            del chunks  # what it holds, before the next inputs arrive
            names = moe.expert(first).names
            for number, parts in zip(chosen, self._everybodys(names, packed), strict=False):
                self._replace(moe.expert(number).names, parts)

    def _inputs_of(
        self,
        layer: Layer,
        dispatch: Dispatch,
        activations: Activations,
        chosen: range,
        counts: Sequence[Sequence[int]],
    ) -> Chunks:
        """The inputs of this rank's expert among the ``chosen``, one a rank, in the order of the tokens."""

        def gather(tokens: torch.Tensor) -> torch.Tensor:
            with self.clock.stage("gather"):
                return layer.mlp_input(activations.rows(tokens))

        if self.ranks.size == 1:
            parts = dispatch.rows(chosen[0]).split(CHUNK_TOKENS)
            if dispatch.counts[chosen[0]] > HELD_TOKENS:
                return lambda: map(gather, parts)
            held = [gather(part) for part in parts]
            return lambda: iter(held)
        received = [sum(row[number] for row in counts) for number in chosen]
        sent = [sum(row[number] for number in chosen) for row in counts]
        exchanged = partial(self._exchanged, lambda number, part: gather(dispatch.rows(number)[part]), chosen, counts)
        if max(*received, *sent) > HELD_TOKENS:
            return lambda: exchanged(CHUNK_TOKENS)
        held = [part for arrived in exchanged(HELD_TOKENS) for part in arrived.split(CHUNK_TOKENS)]
        return lambda: iter(held)

    def _exchanged(
        self, gather: Callable[[int, slice], torch.Tensor], chosen: range, counts: Sequence[Sequence[int]], step: int
    ) -> Iterator[torch.Tensor]:
        """The inputs of this rank's expert from all ranks, in their order, ``step`` of each expert's at a time. All
        ranks take as many steps."""
        rank, size = self.ranks.rank, self.ranks.size
        for first in range(0, max(sum(row[number] for row in counts) for number in chosen), step):
            parts = [_parts([row[number] for row in counts], first, first + step) for number in chosen]
            outgoing = [gather(number, part[rank]) for number, part in zip(chosen, parts, strict=True)]
            outgoing += [outgoing[0][:0]] * (size - len(chosen))
            incoming = [part.stop - part.start for part in parts[rank]] if rank < len(chosen) else [0] * size
            with self.clock.stage("exchange"):
                arrived = torch.cat(self.ranks.exchange(outgoing, incoming))
            del outgoing
            if len(arrived):
                yield arrived

    def _gated(self, mlp: GatedMLP, inputs: Chunks, tokens: int, *, together: bool) -> list[Packed]:
        """Quantize gate and up, which share their input, and then down, which sees what these two make of it."""
        gate, up, down = mlp.names
        first = self._linears((gate, up), inputs, tokens, together=together)
        halves = {name: part.weight(self.weights.dtype) for name, part in zip((gate, up), first, strict=True)}
        quantized = GatedMLP(mlp.prefix, TensorWeights(halves))

        def inner() -> Iterator[torch.Tensor]:
            for x in inputs():
                with self.clock.stage("inner"):
                    y = quantized.inner(x)
                yield y

        return [*first, *self._linears((down,), inner, tokens, together=together)]

    def _linears(self, names: Sequence[str], inputs: Chunks, tokens: int, *, together: bool) -> list[Packed]:
        """Quantize weights that share their inputs: this rank's, or, ``together``, those of all ranks in turn."""
        hessian = Hessian(self.shapes[names[0]][1], tokens, self.weights.device)

        def add(_: torch.Tensor) -> None:
            for x in inputs():
                with self.clock.stage("hessian"):
                    hessian.add(x)

        if together:
            self.ranks.in_turn(hessian.total, add)
        else:
            add(hessian.total)
        packed = self._solve(names, hessian, tokens) if not together or self.ranks.rank == 0 else None
        return self._from_first(names, packed) if together else packed or []

    def _solve(self, names: Sequence[str], hessian: Hessian | None, tokens: int) -> list[Packed]:
        weights = [self.exact(name) for name in names]
        packed = []
        for name, solved in zip(names, self.solver.solve(names, weights, hessian), strict=True):
            with self.clock.stage("pack"):
                group_size, bits = self.solver.group_size(len(solved.codes)), self.solver.settings.bits
                packed.append(Packed.of(solved.codes, solved.scales, group_size=group_size, bits=bits))
            self._done.append((name, tokens, solved.fate))
        return packed

    def _from_first(self, names: Sequence[str], packed: list[Packed] | None) -> list[Packed]:
        """What rank 0 solved, on every rank."""
        if self.ranks.size == 1:
            return packed or []
        return self._unflat(names, self.ranks.broadcast(self._flat(names, packed)))

    def _everybodys(self, names: Sequence[str], packed: list[Packed] | None) -> list[list[Packed]]:
        """What each rank solved, of weights shaped as ``names``, on every rank."""
        if self.ranks.size == 1:
            return [packed or []]
        return [self._unflat(names, content) for content in self.ranks.gather(self._flat(names, packed))]

    def _flat(self, names: Sequence[str], packed: list[Packed] | None) -> torch.Tensor:
        if packed is not None:
            return flat(packed)
        size = flat_bytes(*self._described(names), self.solver.settings.bits)
        return torch.zeros(size, dtype=torch.uint8, device=self.weights.device)

    def _unflat(self, names: Sequence[str], content: torch.Tensor) -> list[Packed]:
        return unflat(content, *self._described(names), self.solver.settings.bits)

    def _described(self, names: Sequence[str]) -> tuple[list[tuple[int, int]], list[int]]:
        shapes = [self.shapes[name] for name in names]
        return shapes, [self.solver.group_size(columns) for _, columns in shapes]

    def _replace(self, names: Sequence[str], packed: Sequence[Packed]) -> None:
        """Compute with the integers from here on, and have rank 0 write them."""
        for name, part in zip(names, packed, strict=True):
            self.weights.replace(name, part)
            if self.ranks.rank == 0:
                for key, tensor in part.stored(name.removesuffix(".weight")):
                    self.outbox.put(key, tensor)


def _parts(counts: Sequence[int], first: int, last: int) -> list[slice]:
    """From ``first`` to ``last`` of all things in a row, of which each rank has so many, as a part of each one's."""
    ends = list(accumulate(counts))
    return [
        slice(min(max(first - end + count, 0), count), min(max(last - end + count, 0), count))
        for end, count in zip(ends, counts, strict=True)
    ]
