"""What a ``config.json`` says about a checkpoint of the DeepSeek-V3 family, checked.

The field names are those of the published configs (``configuration_deepseek.py`` of the members' repositories and
``configuration_deepseek_v2/v3/v32.py``, ``configuration_glm_moe_dsa.py`` of transformers). Defaults are given only
where the members' own configuration classes agree on one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightkit.errors import ConfigError, UnsupportedError
from weightkit.family.quantization import Quantization, read_quantization


@dataclass(frozen=True, slots=True)
class _Member:
    """What a ``model_type`` fixes that its config may leave unsaid."""

    title: str
    scoring_func: str
    topk_method: str
    indexer: bool = False
    mtp_repeats_embedding: bool = True


_MEMBERS: Mapping[str, _Member] = {
    "deepseek_v2": _Member("DeepSeek-V2 family", "softmax", "greedy"),
    "deepseek_v3": _Member("DeepSeek-V3 family", "sigmoid", "noaux_tc"),
    "kimi_k2": _Member("Kimi-K2 family", "sigmoid", "noaux_tc"),
    "deepseek_v32": _Member("DeepSeek-V3.2 family", "sigmoid", "noaux_tc", indexer=True),
    "glm_moe_dsa": _Member("GLM-5 family", "sigmoid", "noaux_tc", indexer=True, mtp_repeats_embedding=False),
}

SUPPORTED = (
    "deepseek_v2 (V2, V2.5, V2-Lite), deepseek_v3 (V3, V3-0324, R1, R1-0528, V3.1, Moonlight), "
    "deepseek_v32 (V3.2), kimi_k2 (Kimi-K2), glm_moe_dsa (GLM-5)"
)
"""The members by ``model_type``, as an error message lists them."""

_DENSE_MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral")
_V4_REASON = (
    "DeepSeek-V4 names its tensors otherwise (layers.N.attn.wq_a), keeps its scales in F8_E8M0 and packs "
    "its experts as FP4 in I8, none of which weightkit reads"
)
_ACTIVATIONS = ("silu", "swish")
_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A member of the family, by the fields of its ``config.json``.

    Attributes (those that are not the config's own name and meaning):
        member: the family's name for people.
        dtype: safetensors spelling of the weights that are not quantized, from ``torch_dtype`` or ``dtype``.
        q_lora_rank: None where queries have one projection, ``q_proj`` (V2-Lite, Moonlight).
        num_nextn_predict_layers: MTP layers stored behind the last one; 0 where the config is silent.
        rope_scaling: the raw dictionary, also where a newer config calls it ``rope_parameters``; None for plain RoPE.
        quantization: None for an unquantized checkpoint.
        indexer_layers: layers that store an indexer; empty for members without sparse attention.
        mtp_repeats_embedding: whether an MTP layer stores an embedding and a head of its own.
    """

    model_type: str
    member: str
    dtype: str
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    moe_layer_freq: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_nextn_predict_layers: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, object] | None = field(hash=False)
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    quantization: Quantization | None
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    index_topk: int | None = None
    indexer_layers: frozenset[int] = frozenset()
    mtp_repeats_embedding: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, where: str = "config.json") -> Architecture:
        """Read and check a ``config.json``.

        Args:
            config: the parsed JSON object.
            where: what to call it in errors.

        Raises:
            UnsupportedError: another architecture, named with what is supported; a variant of GPTQ that is not read.
            ConfigError: fields missing, of a wrong type or impossible; all of them in one message.
        """
        member = _identify(config, where)
        reader = _Reader(config, where)
        architecture = _read(cls, reader, member)
        if architecture is None or reader.problems:
            raise _config_error(reader.problems, where)
        _refuse_unsupported_fields(architecture, config, where)
        return architecture

    @property
    def block_size(self) -> tuple[int, int] | None:
        """Rows and columns of an FP8 block; None where the checkpoint is not FP8."""
        return self.quantization.block_size if self.quantization else None

    @property
    def is_fp8(self) -> bool:
        """Whether the checkpoint's linear weights are F8_E4M3 with block scales."""
        return self.quantization is not None and self.quantization.is_fp8

    @property
    def is_gptq(self) -> bool:
        """Whether linear weights are GPTQ codes packed in I32 words."""
        return self.quantization is not None and self.quantization.is_gptq

    @property
    def has_router_bias(self) -> bool:
        """Whether each router stores ``e_score_correction_bias`` (the selection without auxiliary loss, V3 on)."""
        return self.topk_method == "noaux_tc"

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def total_layers(self) -> int:
        """Layers on disk, MTP layers included."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` has a router and experts; MTP layers always have."""
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


def _identify(config: Mapping[str, object], where: str) -> _Member:
    """The member that ``model_type`` names.

    Raises:
        UnsupportedError: for every other model, with the reason where one is known.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _MEMBERS:
        return _MEMBERS[model_type]
    found = f"model_type {model_type!r}, architectures {config.get('architectures')!r}"
    if model_type in _DENSE_MODEL_TYPES:
        what = "a dense model, such as the distilled models (DeepSeek-R1-Distill), not the MoE that weightkit handles"
        fix = "Use the full model's repository, or a tool for dense models."
    elif model_type == "deepseek_v4":
        what, fix = _V4_REASON, "Use DeepSeek's own tools for this checkpoint."
    elif model_type is None:
        what, fix = "no model_type, so the architecture is unknown", "Take config.json from the published repository."
    else:
        what, fix = "not an architecture that weightkit handles", "Use a member of the DeepSeek-V3 family."
    raise UnsupportedError(what, where=where, expected=f"one of {SUPPORTED}", found=found, fix=fix)


_REQUIRED = object()

#: No config of a real model comes near; a hostile one must not make us build lists of what it claims.
MAX_SIZE = 2**31
MAX_NUMBER = 1e300
MAX_EXPERTS = 1_000_000
MAX_COUNTS = {
    "n_routed_experts": 100_000,
    "num_attention_heads": 100_000,
    "num_hidden_layers": 10_000,
    "num_nextn_predict_layers": 1_000,
}


def _short(value: float) -> str:
    """The number, or how long it is: printing an integer of thousands of digits fails."""
    return (
        f"an integer of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 64 else f"{value}"
    )


class _Reader:
    """Takes typed fields out of a config and keeps every problem, so that one run reports them all."""

    def __init__(self, config: Mapping[str, object], where: str) -> None:
        self.config = config
        self.where = where
        self.problems: list[str] = []

    def _get(self, key: str, default: object) -> object:
        # A null and an absent key mean the same in these configs (q_lora_rank, rope_scaling, n_group of V2-Lite).
        value = self.config.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            self.problems.append(f"{key}: missing" if key not in self.config else f"{key}: null")
            return None
        return default

    def integer(self, key: str, *, minimum: int = 1, default: object = _REQUIRED) -> int:
        value = self._get(key, default)
        # bool is a subclass of int: `true` is a config's mistake here, not 1.
        if isinstance(value, bool) or not isinstance(value, int):
            if value is not None:
                self.problems.append(f"{key}: expected an integer, found {value!r}")
            return minimum
        if value < minimum:
            self.problems.append(f"{key}: expected at least {minimum}, found {_short(value)}")
            return minimum
        most = MAX_COUNTS.get(key, MAX_SIZE)
        if value > most:
            self.problems.append(f"{key}: expected at most {most:,}, found {_short(value)}")
            return minimum
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.config.get(key) is None else self.integer(key)

    def number(self, key: str, *, default: object = _REQUIRED, source: Mapping[str, object] | None = None) -> float:
        value = self._get(key, default) if source is None else source.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            if value is not None:
                self.problems.append(f"{key}: expected a number, found {value!r}")
            return 1.0
        if not 0 < value < MAX_NUMBER:
            self.problems.append(f"{key}: expected a positive finite number, found {_short(value)}")
            return 1.0
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.problems.append(f"{key}: expected true or false, found {value!r}")
            return default
        return value

    def choice(self, key: str, choices: Sequence[str], *, default: str) -> str:
        value = self._get(key, default)
        if value not in choices:
            self.problems.append(f"{key}: expected one of {', '.join(choices)}, found {value!r}")
            return default
        return str(value)

    def mapping(self, key: str) -> Mapping[str, object] | None:
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problems.append(f"{key}: expected an object, found {value!r}")
            return None
        return value


def _read(cls: type[Architecture], reader: _Reader, member: _Member) -> Architecture | None:
    """All fields; the caller looks at ``reader.problems`` before it uses the result."""
    rope_theta, rope_scaling = _rope(reader)
    layers = reader.integer("num_hidden_layers")
    architecture = cls(
        model_type=str(reader.config["model_type"]),
        member=member.title,
        dtype=_dtype(reader),
        hidden_size=reader.integer("hidden_size"),
        vocab_size=reader.integer("vocab_size"),
        num_hidden_layers=layers,
        first_k_dense_replace=reader.integer("first_k_dense_replace", minimum=0),
        moe_layer_freq=reader.integer("moe_layer_freq", default=1),
        num_attention_heads=reader.integer("num_attention_heads"),
        q_lora_rank=reader.optional_integer("q_lora_rank"),
        kv_lora_rank=reader.integer("kv_lora_rank"),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim"),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim"),
        v_head_dim=reader.integer("v_head_dim"),
        intermediate_size=reader.integer("intermediate_size"),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        n_routed_experts=reader.integer("n_routed_experts"),
        n_shared_experts=reader.integer("n_shared_experts", minimum=0),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        n_group=reader.integer("n_group", default=1),
        topk_group=reader.integer("topk_group", default=1),
        scoring_func=reader.choice("scoring_func", ("softmax", "sigmoid"), default=member.scoring_func),
        topk_method=reader.choice(
            "topk_method", ("greedy", "group_limited_greedy", "noaux_tc"), default=member.topk_method
        ),
        norm_topk_prob=reader.boolean("norm_topk_prob", default=member.scoring_func == "sigmoid"),
        routed_scaling_factor=reader.number("routed_scaling_factor", default=1.0),
        num_nextn_predict_layers=reader.integer("num_nextn_predict_layers", minimum=0, default=0),
        rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=reader.integer("max_position_embeddings"),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=False),
        attention_bias=reader.boolean("attention_bias", default=False),
        quantization=_quantization(reader),
        index_n_heads=reader.integer("index_n_heads") if member.indexer else None,
        index_head_dim=reader.integer("index_head_dim") if member.indexer else None,
        index_topk=reader.integer("index_topk") if member.indexer else None,
        indexer_layers=_indexer_layers(reader, layers) if member.indexer else frozenset(),
        mtp_repeats_embedding=member.mtp_repeats_embedding,
    )
    if not reader.problems:  # relations between fields say nothing while the fields themselves are wrong
        reader.problems.extend(_contradictions(architecture))
    return architecture


def _dtype(reader: _Reader) -> str:
    key = "dtype" if reader.config.get("torch_dtype") is None else "torch_dtype"
    return _DTYPES[reader.choice(key, tuple(_DTYPES), default="bfloat16")]


def _rope(reader: _Reader) -> tuple[float, Mapping[str, object] | None]:
    """``rope_theta`` and the scaling, from either spelling. ``rope_parameters`` (transformers 5) holds both."""
    parameters = reader.mapping("rope_parameters")
    scaling = reader.mapping("rope_scaling") if parameters is None else parameters
    inner_theta = scaling is not None and scaling.get("rope_theta") is not None
    theta = reader.number("rope_theta", default=10000.0, source=scaling if inner_theta else None)
    kind = None if scaling is None else rope_type(scaling)
    if kind in (None, "default"):
        return theta, None
    if not isinstance(kind, str):
        reader.problems.append(f"rope_scaling.type: expected a string, found {str(kind)[:80]}")
    elif scaling is not None and kind == "yarn":
        _check_yarn(reader, scaling, theta)
    return theta, scaling


def rope_type(scaling: Mapping[str, object]) -> object:
    """The kind of a ``rope_scaling`` or ``rope_parameters``, by its newer name or its older; None where it has none."""
    return scaling.get("rope_type") or scaling.get("type")


def _check_yarn(reader: _Reader, scaling: Mapping[str, object], theta: float) -> None:
    """What every reader computes the frequencies from; fields other than ``factor`` have defaults."""
    if scaling.get("factor") is None:
        reader.problems.append("rope_scaling.factor: missing, and YaRN needs it")
    for key in ("factor", "attention_factor"):
        if scaling.get(key) is not None:
            reader.number(key, source=scaling)
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if scaling.get(key) not in (None, 0):  # 0 says the same as nothing
            reader.number(key, source=scaling)
    if theta <= 1 and not reader.problems:  # it is 1 where it could not be read
        reader.problems.append(f"rope_theta: YaRN divides by its logarithm, expected more than 1, found {theta}")
    original = scaling.get("original_max_position_embeddings")
    if original is not None and not (type(original) is int and 0 < original <= MAX_SIZE):
        reader.problems.append(
            f"original_max_position_embeddings: expected a positive integer, found {str(original)[:80]}"
        )


def _quantization(reader: _Reader) -> Quantization | None:
    raw = reader.mapping("quantization_config")
    return None if raw is None else read_quantization(raw, reader.problems, where=reader.where)


def _indexer_layers(reader: _Reader, layers: int) -> frozenset[int]:
    """Layers with an indexer of their own: all, unless ``indexer_types`` calls some ``shared`` (GLM-5 only).

    Source: ``configuration_glm_moe_dsa.py`` of transformers.
    """
    nextn = reader.integer("num_nextn_predict_layers", minimum=0, default=0)
    everywhere = frozenset(range(layers + nextn))
    types = reader.config.get("indexer_types")
    if types is None:
        return everywhere
    if not isinstance(types, list) or len(types) < layers or not all(kind in ("full", "shared") for kind in types):
        reader.problems.append(f"indexer_types: expected {layers} of 'full' or 'shared', found {str(types)[:80]}")
        return everywhere
    return everywhere - {layer for layer, kind in enumerate(types) if kind == "shared"}


def _contradictions(arch: Architecture) -> list[str]:
    """Fields that are each possible and together are not."""
    problems = []
    if arch.total_layers * arch.n_routed_experts > MAX_EXPERTS:
        problems.append(f"n_routed_experts: {arch.n_routed_experts:,} in each of {arch.total_layers:,} layers")
    if arch.first_k_dense_replace > arch.num_hidden_layers:
        problems.append(
            f"first_k_dense_replace: {arch.first_k_dense_replace} dense layers of {arch.num_hidden_layers} layers"
        )
    if arch.num_experts_per_tok > arch.n_routed_experts:
        problems.append(
            f"num_experts_per_tok: {arch.num_experts_per_tok} experts for a token, of {arch.n_routed_experts} experts"
        )
    if arch.n_routed_experts % arch.n_group:
        problems.append(f"n_group: {arch.n_routed_experts} routed experts do not divide into {arch.n_group} groups")
    if arch.topk_group > arch.n_group:
        problems.append(f"topk_group: {arch.topk_group} groups for a token, of {arch.n_group} groups")
    if arch.qk_rope_head_dim % 2:
        problems.append(f"qk_rope_head_dim: rotation takes pairs, found {arch.qk_rope_head_dim}")
    if arch.indexer_layers and arch.q_lora_rank is None:
        problems.append("q_lora_rank: missing, and the indexer's wq_b reads the query's latent")
    return problems


def _config_error(problems: Sequence[str], where: str) -> ConfigError:
    count = len(problems)
    listing = "".join(f"\n  {problem}" for problem in problems)
    what = f"{count} problem{'s' if count != 1 else ''} in the architecture's fields:{listing}"
    return ConfigError(
        what, where=where, fix="Correct these fields, or take config.json from the published repository."
    )


def _refuse_unsupported_fields(arch: Architecture, config: Mapping[str, object], where: str) -> None:
    """Fields that the configuration classes allow and no published member uses."""
    activation = config.get("hidden_act")
    if activation not in (None, *_ACTIVATIONS):
        raise UnsupportedError(
            "another activation function than all published members of the family have",
            where=f"{where}: hidden_act",
            expected=_ACTIVATIONS[0],
            found=activation,
            fix="Check that config.json belongs to this checkpoint.",
        )
    if arch.attention_bias:
        raise UnsupportedError(
            "attention_bias is true, which no published member of the family has",
            where=where,
            expected="attention_bias false",
            found="true",
            fix="Check that config.json belongs to this checkpoint.",
        )
