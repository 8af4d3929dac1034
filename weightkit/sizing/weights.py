"""Bytes of weights: by part of the model, and of each what one rank of several holds.

All of it is summed over the blueprint's records. Which dimension an engine divides is the blueprint's ``split_dim``:
the same that vLLM's and SGLang's ``deepseek_v2.py`` name by their layers' classes (column, row, replicated).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from weightkit.family import Architecture, Expected, Role, expert_ranges, layer_records, outer_records
from weightkit.family.blueprint import quantizable_modules

#: In the order of the model. ``rest``: routers, norms, and what few members store beside.
PARTS = ("embedding", "attention", "indexer", "dense", "shared", "routed", "rest", "head", "mtp")
MTP = "mtp"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model, in bytes.

    Attributes:
        split: divided among ranks by rows or columns.
        whole: on every rank.
        experts: of routed experts.
        experts_whole: of these, what is on every rank where experts are cut: of gate and up in GPTQ, the group numbers
            of their input features (``g_idx``), which engines may drop once they have loaded them.
    """

    split: int = 0
    whole: int = 0
    experts: int = 0
    experts_whole: int = 0

    @property
    def size_bytes(self) -> int:
        """All of it, once."""
        return self.split + self.whole + self.experts

    def on_rank(self, n: int, n_experts: int, *, whole_experts: bool) -> int:
        """Bytes on the rank with most, of ``n``."""
        cut = -(-self.split // n) + self.whole
        if whole_experts:
            return cut + self.experts // n_experts * len(expert_ranges(n_experts, n)[0])
        return cut + -(-(self.experts - self.experts_whole) // n) + self.experts_whole

    def plus(self, record: Expected, count: int, *, cut_whole: bool) -> Part:
        """With ``count`` records like this one."""
        size = record.size_bytes * count
        if record.expert is not None:
            whole = self.experts_whole + size * cut_whole
            return replace(self, experts=self.experts + size, experts_whole=whole)
        if record.split_dim is not None:
            return replace(self, split=self.split + size)
        return replace(self, whole=self.whole + size)


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights in one format.

    Attributes:
        parts: by name, of ``PARTS``; all of the MTP layers is ``mtp``.
        n_experts: routed experts a layer.
        experts_per_token: of these, what a token uses.
        kv_b: elements of ``kv_b_proj`` where it is quantized; see ``absorbed_on_rank``.
        tied: whether the embedding is the head.
    """

    parts: Mapping[str, Part]
    n_experts: int
    experts_per_token: int
    kv_b: int
    tied: bool

    def size_bytes(self, *, mtp: bool) -> int:
        """Bytes of data, with or without the MTP layers."""
        return sum(part.size_bytes for name, part in self.parts.items() if mtp or name != MTP)

    def on_rank(self, n: int, *, whole_experts: bool, mtp: bool) -> dict[str, int]:
        """Bytes by part on the rank with most, of ``n``.

        Args:
            whole_experts: expert parallelism: a rank holds whole experts, as evenly as they go. Else each expert is
                cut as the shared one is.
            mtp: whether an engine loads the MTP layers.
        """
        return {
            name: part.on_rank(n, self.n_experts, whole_experts=whole_experts)
            for name, part in self.parts.items()
            if mtp or name != MTP
        }

    def absorbed_on_rank(self, n: int) -> int:
        """Bytes of the copy of ``kv_b_proj`` in BF16 that engines keep on each of ``n`` ranks where it is quantized.

        Attention over the latent cache multiplies by its two halves. vLLM dequantizes them once
        (``process_weights_after_loading``: ``W_UK_T`` and ``W_UV``) and keeps the weight for prefill; of a BF16 weight
        they are views.
        """
        return -(-self.kv_b * 2 // n)

    @property
    def resident(self) -> int:
        """Bytes that every token of the main model multiplies by: all but routed experts and, of the embedding, all but
        a row."""
        return sum(
            part.split + part.whole
            for name, part in self.parts.items()
            if name != MTP and (name != "embedding" or self.tied)
        )

    @property
    def routed_a_token(self) -> int:
        """Bytes of the routed experts that one token uses, in all layers of the main model."""
        return self.parts["routed"].experts // self.n_experts * self.experts_per_token if "routed" in self.parts else 0


def weigh(arch: Architecture, *, alike: bool = True) -> Weights:
    """Sum the blueprint.

    Args:
        arch: of one format, with the MTP layers that are to be counted.
        alike: count one layer for all of its kind: an eighth of a second in place of one. Not for a checkpoint's own
            GPTQ rules, which may name single experts.
    """
    whole = _whole_in_cut_experts(arch)
    parts: dict[str, Part] = {}
    kv_b = 0
    for record, count in _counted(arch, alike=alike):
        name = record.component if record.component in PARTS else "rest"
        cut_whole = record.expert is not None and _leaf(record) in whole
        parts[name] = parts.get(name, Part()).plus(record, count, cut_whole=cut_whole)
        if record.name.endswith(_KV_B) and not record.mtp and record.scale_name is not None:
            kv_b += record.parameters * count
    ordered = {name: parts[name] for name in PARTS if name in parts}
    return Weights(ordered, arch.n_routed_experts, arch.num_experts_per_tok, kv_b, arch.tie_word_embeddings)


_KV_B = (".kv_b_proj.weight", ".kv_b_proj.qweight")


def _counted(arch: Architecture, *, alike: bool) -> Iterator[tuple[Expected, int]]:
    """Every record of the blueprint, or one for all like it, with their number."""
    for record in outer_records(arch):
        yield record, 1
    for layer, count in alike_layers(arch, alike=alike):
        for record in layer_records(arch, layer):
            yield record, count


def alike_layers(arch: Architecture, *, alike: bool) -> list[tuple[int, int]]:
    """One layer for all of its kind, with their number; every layer where they are not to be taken for ``alike``."""
    kinds: dict[object, list[int]] = {}
    for layer in range(arch.total_layers):
        kinds.setdefault(_kind(arch, layer) if alike else layer, []).append(layer)
    return [(layers[0], len(layers)) for layers in kinds.values()]


def _kind(arch: Architecture, layer: int) -> object:
    """What a layer's tensors depend on, expert for expert alike."""
    quantization = arch.quantization
    quantized: tuple[bool, ...] = ()
    if quantization is not None:
        modules = quantizable_modules(replace(arch, n_routed_experts=1), layer)
        quantized = tuple(quantization.quantizes(module) for module in modules)
    return arch.is_moe_layer(layer), layer >= arch.num_hidden_layers, layer in arch.indexer_layers, quantized


def _whole_in_cut_experts(arch: Architecture) -> frozenset[str]:
    """Of an expert's tensors (``up_proj.g_idx``) those that have no dimension to cut: as of the shared expert, whose
    ``split_dim`` the blueprint knows."""
    shared = replace(arch, n_routed_experts=1, n_shared_experts=1)
    layer = next((layer for layer in range(arch.total_layers) if arch.is_moe_layer(layer)), None)
    if layer is None:
        return frozenset()
    return frozenset(
        _leaf(record)
        for record in layer_records(shared, layer)
        if record.role is Role.SHARED_EXPERT and record.split_dim is None
    )


def _leaf(record: Expected) -> str:
    return ".".join(record.name.split(".")[-2:])
