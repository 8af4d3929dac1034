"""Every tensor that a checkpoint of the family must hold, from its architecture alone.

Names, shapes and dtypes are those of the published repositories; for DeepSeek-V3 the totals equal the counts that the
repository reports for itself (684,531,386,000 elements in 91,991 tensors). Nothing here knows the number 61 or 256:
both come from the config.

What is known of each member beyond V3, against the element counts that the Hugging Face repositories report:
  V2, V2.5 (235,741,434,880) and V2-Lite (15,706,484,224) agree exactly.
  V3.2-Exp (685,396,921,376) agrees: indexer shapes from ``DeepseekV32Indexer`` of transformers, in every layer, MTP
    included. Unverified: whether ``k_norm`` and ``weights_proj`` are BF16 or F32, which a sum does not tell.
  GLM-5 agrees by dtype (753,864,119,552 in BF16, 19,456 in F32), so its indexers are BF16, and its MTP layer has
    neither embedding nor head. GLM-5-FP8 (753,910,024,032) agrees with wq_b and wk in FP8.
  Kimi-K2-Instruct agrees in tensors (139,644), elements (1,026,408,235,864, the hub leaving the scales out) and
    bytes (1,029,173,256,720): its ``inv_freq`` is BF16 and as long as half of hidden_size / heads, 56, not the 32 that
    the rotary width asks for. Kimi-K2-Instruct-0905 stores 128 instead. Hold no shape against an optional tensor.
  Moonlight (15,960,111,936) agrees with an ``inv_freq`` of that length (64). Its correction bias is BF16, as readers of
    its files report; not verified here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from itertools import chain, pairwise
from math import prod
from typing import NamedTuple

from weightkit.errors import UnsupportedError
from weightkit.family.architecture import Architecture
from weightkit.family.quantization import FP8, Quantization

DTYPE_SIZE_BYTES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4}
"""Size of an element of each dtype that a blueprint names."""


class Role(Enum):
    """What a tensor is for. The value is the component that ``inspect`` counts it under."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    ATTENTION = "attention"
    INDEXER = "indexer"
    ROTARY = "rotary"
    DENSE_MLP = "dense"
    ROUTER = "router"
    ROUTER_BIAS = "router bias"
    ROUTED_EXPERT = "routed"
    SHARED_EXPERT = "shared"
    MTP = "mtp"


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor of a checkpoint as published.

    Attributes:
        name: the published name.
        dtype: safetensors spelling.
        shape: rows first, ``[out, in]`` for a linear weight.
        role: what it is for. Tensors of an MTP layer keep their role (attention, routed expert...);
            ``Role.MTP`` is for what only an MTP layer has. See ``component``.
        layer: its layer, None outside the layers.
        expert: the routed expert it belongs to, else None.
        scale_name: of an FP8 weight, the tensor with its block scales; of a GPTQ ``qweight``, its ``scales``.
        weight_name: of a scale tensor, its FP8 weight; of ``qzeros``, ``scales`` and ``g_idx``, their ``qweight``.
        split_dim: the dimension that model parallelism divides; None: whole on every rank, or, where ``expert`` is
            set, whole on the one rank that owns the expert. A scale splits as its weight does. A rank's part of
            ``g_idx`` keeps the group numbers of the whole.
        optional: a checkpoint without it is complete, and its shape may differ (``rotary_emb.inv_freq``, which
            follows from the config and which nobody reads).
        mtp: whether it belongs to an MTP layer.
        other_dtypes: dtypes that are as good as ``dtype``, where what is published is not certain.
        codes_per_word: of a GPTQ ``qweight``, the weights that an element holds; 1 of any other tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None
    scale_name: str | None = None
    weight_name: str | None = None
    split_dim: int | None = None
    optional: bool = False
    mtp: bool = False
    other_dtypes: tuple[str, ...] = ()
    codes_per_word: int = 1

    def allows(self, dtype: str) -> bool:
        """Whether a checkpoint may store it in ``dtype``."""
        return dtype == self.dtype or dtype in self.other_dtypes

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def parameters(self) -> int:
        """The model's weights that it stands for: none for what belongs to a quantized weight, nor for ``inv_freq``."""
        if self.weight_name is not None or self.role is Role.ROTARY:
            return 0
        return prod(self.shape) * self.codes_per_word

    @property
    def size_bytes(self) -> int:
        """Bytes of data on disk."""
        return prod(self.shape) * DTYPE_SIZE_BYTES[self.dtype]

    @property
    def component(self) -> str:
        """The part of the model it is counted under: ``mtp`` for all of an MTP layer, else by role."""
        if self.mtp:
            return Role.MTP.value
        return Role.ROUTER.value if self.role is Role.ROUTER_BIAS else self.role.value


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over tensors.

    Attributes:
        elements: elements by dtype, in safetensors spelling.
        tensors: number of tensors.
        size_bytes: bytes of data, headers not counted.
    """

    elements: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    size_bytes: int = 0

    @property
    def total_elements(self) -> int:
        """Elements of all dtypes."""
        return sum(self.elements.values())


def totals(records: Iterable[Expected]) -> Totals:
    """Sum the records, optional ones as any other: filter before where they should not count."""
    elements: dict[str, int] = {}
    tensors = 0
    for record in records:
        elements[record.dtype] = elements.get(record.dtype, 0) + record.elements
        tensors += 1
    size_bytes = sum(count * DTYPE_SIZE_BYTES[dtype] for dtype, count in elements.items())
    return Totals(elements, tensors, size_bytes)


def blueprint(arch: Architecture) -> dict[str, Expected]:
    """Every expected tensor by its published name, in the model's order: embedding, layers, norm, head, MTP layers.

    An FP8 weight ``NAME.weight`` is followed by ``NAME.weight_scale_inv``. In place of a weight [N, K] that GPTQ
    quantized stand ``NAME.qweight`` (I32 [K * bits / 32, N]), ``NAME.qzeros`` (I32 [groups, N * bits / 32]),
    ``NAME.scales`` (F16 [groups, N]) and ``NAME.g_idx`` (I32 [K]).

    Raises:
        UnsupportedError: the checkpoint is quantized by a method whose tensors weightkit does not know, or by GPTQ
            although a weight's rows or columns fill no whole words.
    """
    _require_known_quantization(arch)
    embedding, *after = outer_records(arch)
    records = {embedding.name: embedding}
    for layer in range(arch.num_hidden_layers):
        records.update((record.name, record) for record in layer_records(arch, layer))
    records.update((record.name, record) for record in after)
    for layer in range(arch.num_hidden_layers, arch.total_layers):
        records.update((record.name, record) for record in layer_records(arch, layer))
    return records


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name, published (``model.layers.3...``) or of the demo (``layers.3...``); else None."""
    parts = name.split(".", 3)
    if parts[0] == "model":
        parts = parts[1:]
    if len(parts) < 2 or parts[0] != "layers" or not _is_number(parts[1]):
        return None
    return int(parts[1])


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) <= 9  # longer ones are no layer of anything


def expert_of(name: str) -> int | None:
    """The routed expert in a tensor's name, published or of the demo; else None."""
    parts = name.split(".")
    for before, after in pairwise(parts):
        if before == "experts" and _is_number(after):
            return int(after)
    return None


def quantizable_modules(arch: Architecture, layer: int) -> dict[str, tuple[int, int]]:
    """The linear layers of a layer that a quantization may quantize, those that are F8_E4M3 in the FP8 form, by module
    (``model.layers.3.mlp.experts.0.up_proj``), with rows and columns of the weight ``[out, in]``."""
    records = layer_records(replace(arch, quantization=FP8), layer)
    return {
        record.name.removesuffix(".weight"): (record.shape[0], record.shape[1])
        for record in records
        if record.scale_name is not None
    }


def is_mtp(name: str, arch: Architecture) -> bool:
    """Whether a tensor belongs to an MTP layer: one at or past ``num_hidden_layers``."""
    layer = layer_of(name)
    return layer is not None and layer >= arch.num_hidden_layers


class _Template(NamedTuple):
    """A tensor below ``model.layers.N.``; the same for every layer of its kind."""

    suffix: str
    shape: tuple[int, ...]
    role: Role
    split_dim: int | None = None
    expert: int | None = None
    quantized: bool = False  # F8_E4M3 with a scale in the FP8 form, codes in words in the GPTQ form
    dtype: str | None = None  # None: the checkpoint's unquantized dtype
    optional: bool = False
    other_dtypes: tuple[str, ...] = ()


def outer_records(arch: Architecture) -> Iterator[Expected]:
    """The tensors outside the layers: embedding, final norm, and the head where it is not tied to the embedding."""
    shape = (arch.vocab_size, arch.hidden_size)
    yield Expected("model.embed_tokens.weight", arch.dtype, shape, Role.EMBEDDING, split_dim=0)
    yield Expected("model.norm.weight", arch.dtype, (arch.hidden_size,), Role.NORM)
    if not arch.tie_word_embeddings:
        yield Expected("lm_head.weight", arch.dtype, shape, Role.HEAD, split_dim=0)


def layer_records(arch: Architecture, layer: int) -> Iterator[Expected]:
    """The tensors of one layer, an MTP layer's own ones first."""
    mtp = layer >= arch.num_hidden_layers
    if mtp:
        yield from _expand(arch, _mtp_templates(arch), layer, mtp=True)
    yield from _expand(arch, _attention_templates(arch, layer), layer, mtp=mtp)
    mlp = _moe_templates(arch) if arch.is_moe_layer(layer) else _dense_templates(arch)
    yield from _expand(arch, mlp, layer, mtp=mtp)
    yield from _expand(arch, _norm_templates(arch), layer, mtp=mtp)


def _expand(arch: Architecture, templates: Iterable[_Template], layer: int, *, mtp: bool) -> Iterator[Expected]:
    """Records of a layer from templates; a quantized weight is followed by what belongs to it."""
    prefix = f"model.layers.{layer}."
    quantization, block = arch.quantization, None if arch.quantization is None else arch.quantization.block_size
    for template in templates:
        suffix, shape, role, split_dim, expert, quantized, dtype, optional, others = template
        name = prefix + suffix
        if quantized and quantization is not None and quantization.quantizes(name.removesuffix(".weight")):
            if quantization.is_gptq:
                yield from _gptq_records(quantization, name, template, layer, mtp=mtp)
                continue
            if block is not None:
                scale, blocks = f"{name}_scale_inv", (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
                yield Expected(name, "F8_E4M3", shape, role, layer, expert, scale, None, split_dim, optional, mtp)
                yield Expected(scale, "F32", blocks, role, layer, expert, None, name, split_dim, optional, mtp)
                continue
        yield Expected(
            name, dtype or arch.dtype, shape, role, layer, expert, None, None, split_dim, optional, mtp, others
        )


def _gptq_records(
    quantization: Quantization, name: str, template: _Template, layer: int, *, mtp: bool
) -> Iterator[Expected]:
    """GPTQ stores the transpose: rows of the weight are columns here. One group for all of K belongs to every rank."""
    rows, columns = template.shape
    words, role, expert = quantization.codes_per_word, template.role, template.expert
    if rows % words or columns % words:
        raise UnsupportedError(
            "a weight whose rows or columns fill no whole words cannot be stored as GPTQ",
            where=name,
            expected=f"multiples of {words}",
            found=list(template.shape),
            fix="Check that config.json belongs to this checkpoint.",
        )
    groups, module = quantization.groups(columns), name.removesuffix(".weight")
    across = {None: None, 0: 1, 1: 0}[template.split_dim]
    per_group = None if across == 0 and quantization.group_size == -1 else across
    along = 0 if across == 0 else None
    qweight, scales = f"{module}.qweight", f"{module}.scales"
    yield Expected(
        qweight,
        "I32",
        (columns // words, rows),
        role,
        layer,
        expert,
        scales,
        None,
        across,
        mtp=mtp,
        codes_per_word=words,
    )
    for leaf, dtype, shape, split_dim in (
        ("qzeros", "I32", (groups, rows // words), per_group),
        ("scales", "F16", (groups, rows), per_group),
        ("g_idx", "I32", (columns,), along),
    ):
        yield Expected(f"{module}.{leaf}", dtype, shape, role, layer, expert, None, qweight, split_dim, mtp=mtp)


def _attention_templates(arch: Architecture, layer: int) -> list[_Template]:
    heads, hidden = arch.num_attention_heads, arch.hidden_size
    attention = Role.ATTENTION
    rows = heads * arch.qk_head_dim
    if arch.q_lora_rank is None:
        found = [_Template("self_attn.q_proj.weight", (rows, hidden), attention, 0, quantized=True)]
    else:
        rank = arch.q_lora_rank
        found = [
            _Template("self_attn.q_a_proj.weight", (rank, hidden), attention, quantized=True),
            _Template("self_attn.q_a_layernorm.weight", (rank,), attention),
            _Template("self_attn.q_b_proj.weight", (rows, rank), attention, 0, quantized=True),
        ]
    latent, value = arch.kv_lora_rank, arch.v_head_dim
    kv_a, kv_b = (latent + arch.qk_rope_head_dim, hidden), (heads * (arch.qk_nope_head_dim + value), latent)
    found += [
        _Template("self_attn.kv_a_proj_with_mqa.weight", kv_a, attention, quantized=True),
        _Template("self_attn.kv_a_layernorm.weight", (latent,), attention),
        _Template("self_attn.kv_b_proj.weight", kv_b, attention, 0, quantized=True),
        _Template("self_attn.o_proj.weight", (hidden, heads * value), attention, 1, quantized=True),
    ]
    return [*found, *_indexer_templates(arch, layer), *_rotary_templates(arch, layer)]


def _indexer_templates(arch: Architecture, layer: int) -> list[_Template]:
    """The lightning indexer: whole on every rank, as in the inference demo of V3.2."""
    if layer not in arch.indexer_layers or arch.index_n_heads is None or arch.index_head_dim is None:
        return []
    heads, width, hidden = arch.index_n_heads, arch.index_head_dim, arch.hidden_size
    rank = arch.q_lora_rank or 0  # from_config refuses an indexer without q_lora_rank
    others = ("F32",) if arch.model_type == "deepseek_v32" else ()
    return [
        _Template("self_attn.indexer.wq_b.weight", (heads * width, rank), Role.INDEXER, quantized=True),
        _Template("self_attn.indexer.wk.weight", (width, hidden), Role.INDEXER, quantized=True),
        _Template("self_attn.indexer.k_norm.weight", (width,), Role.INDEXER, other_dtypes=others),
        _Template("self_attn.indexer.k_norm.bias", (width,), Role.INDEXER, other_dtypes=others),
        _Template("self_attn.indexer.weights_proj.weight", (heads, hidden), Role.INDEXER, other_dtypes=others),
    ]


def _is_moonlight(arch: Architecture) -> bool:
    """Moonlight calls itself ``deepseek_v3``; it alone among those has no ``q_lora_rank``."""
    return arch.model_type == "deepseek_v3" and arch.q_lora_rank is None


def _rotary_templates(arch: Architecture, layer: int) -> list[_Template]:
    """``inv_freq``, which Kimi-K2 and Moonlight store although it follows from the config; see above for its length."""
    if layer >= arch.num_hidden_layers or not (arch.model_type == "kimi_k2" or _is_moonlight(arch)):
        return []
    shape = (max(1, arch.hidden_size // arch.num_attention_heads // 2),)
    name = "self_attn.rotary_emb.inv_freq"
    return [_Template(name, shape, Role.ROTARY, dtype="BF16", optional=True, other_dtypes=("F16", "F32"))]


def _mlp_templates(
    path: str, hidden: int, width: int, role: Role, *, split: bool, expert: int | None = None
) -> list[_Template]:
    """A gated MLP: gate and up ``[width, hidden]``, split by rows; down ``[hidden, width]``, split by columns."""
    rows, columns = (0, 1) if split else (None, None)
    return [
        _Template(f"{path}.gate_proj.weight", (width, hidden), role, rows, expert, True),
        _Template(f"{path}.up_proj.weight", (width, hidden), role, rows, expert, True),
        _Template(f"{path}.down_proj.weight", (hidden, width), role, columns, expert, True),
    ]


def _dense_templates(arch: Architecture) -> list[_Template]:
    return _mlp_templates("mlp", arch.hidden_size, arch.intermediate_size, Role.DENSE_MLP, split=True)


def _moe_templates(arch: Architecture) -> list[_Template]:
    hidden, width, experts = arch.hidden_size, arch.moe_intermediate_size, arch.n_routed_experts
    found = [_Template("mlp.gate.weight", (experts, hidden), Role.ROUTER)]
    if arch.has_router_bias:
        name, moonlight = "mlp.gate.e_score_correction_bias", _is_moonlight(arch)
        dtype, others = (arch.dtype, ("F32",)) if moonlight else ("F32", ())
        found.append(_Template(name, (experts,), Role.ROUTER_BIAS, dtype=dtype, other_dtypes=others))
    found += _expert_templates(hidden, width, experts)
    if arch.n_shared_experts:
        shared = width * arch.n_shared_experts
        found += _mlp_templates("mlp.shared_experts", hidden, shared, Role.SHARED_EXPERT, split=True)
    return found


@lru_cache(maxsize=1)
def _expert_templates(hidden: int, width: int, experts: int) -> tuple[_Template, ...]:
    """Of all routed experts; kept, because every layer has as many."""
    role = Role.ROUTED_EXPERT
    each = (
        _mlp_templates(f"mlp.experts.{expert}", hidden, width, role, split=False, expert=expert)
        for expert in range(experts)
    )
    return tuple(chain.from_iterable(each))


def _norm_templates(arch: Architecture) -> list[_Template]:
    return [
        _Template("input_layernorm.weight", (arch.hidden_size,), Role.NORM),
        _Template("post_attention_layernorm.weight", (arch.hidden_size,), Role.NORM),
    ]


def _mtp_templates(arch: Architecture) -> list[_Template]:
    """What an MTP layer has beyond a MoE layer. In GLM-5 it repeats neither the embedding nor the head."""
    vocab, hidden = arch.vocab_size, arch.hidden_size
    found = [
        _Template("enorm.weight", (hidden,), Role.MTP),
        _Template("hnorm.weight", (hidden,), Role.MTP),
        _Template("eh_proj.weight", (hidden, 2 * hidden), Role.MTP),
        _Template("shared_head.norm.weight", (hidden,), Role.MTP),
    ]
    if arch.mtp_repeats_embedding:
        found.insert(0, _Template("embed_tokens.weight", (vocab, hidden), Role.EMBEDDING, 0))
        found.append(_Template("shared_head.head.weight", (vocab, hidden), Role.HEAD, 0))
    return found


def _require_known_quantization(arch: Architecture) -> None:
    if arch.quantization is not None and not (arch.is_fp8 or arch.is_gptq):
        raise UnsupportedError(
            "the tensors of this quantization are not known",
            where="quantization_config.quant_method",
            expected="fp8, gptq, or no quantization_config",
            found=arch.quantization.method,
            fix="Use the FP8 or BF16 repository of this model.",
        )
