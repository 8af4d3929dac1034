"""Published tensor names and those of DeepSeek's inference demo, renamed both ways.

Every rename is of a whole path component at its own place: ``gate`` never touches ``gate_proj``, ``head`` never
``shared_head``, and the router's ``bias`` never a norm's.
"""

from __future__ import annotations

from weightkit.errors import CheckpointError

_TOP = {"embed_tokens": "embed", "norm": "norm", "layers": "layers"}  # below `model.`, which the demo drops
_HEAD = ("lm_head", "head")  # the one tensor that is not below `model.`
_IN_LAYER = {
    "self_attn": "attn",
    "mlp": "ffn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "embed",  # an MTP layer's own; the demo never loads it, but a name has one rename
}
_IN_BLOCK = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}
_LEAF = {"weight_scale_inv": "scale"}
_ROUTER = ("e_score_correction_bias", "bias")  # of `gate` alone: the indexer's k_norm.bias keeps its name


def _reverse(renames: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in renames.items()}


_FROM_TOP, _FROM_LAYER, _FROM_BLOCK, _FROM_LEAF = map(_reverse, (_TOP, _IN_LAYER, _IN_BLOCK, _LEAF))


def to_demo(name: str) -> str:
    """The demo's name of a tensor: ``model.layers.3.self_attn.q_a_proj.weight`` -> ``layers.3.attn.wq_a.weight``.

    Raises:
        CheckpointError: not a published name of the family.
    """
    parts = name.split(".")
    if parts[0] == _HEAD[0] and len(parts) > 1:
        return ".".join([_HEAD[1], *_leaf(parts[1:], _LEAF)])
    if parts[0] != "model" or len(parts) < 3 or parts[1] not in _TOP:
        raise _unknown(name, "a published name (model.embed_tokens, model.layers.N, model.norm or lm_head)")
    top, rest = parts[1], parts[2:]
    rest = _layer(rest, _IN_LAYER, _IN_BLOCK, _LEAF, _ROUTER) if top == "layers" else _leaf(rest, _LEAF)
    return ".".join([_TOP[top], *rest])


def to_published(name: str) -> str:
    """The published name of a demo tensor: the exact inverse of ``to_demo``.

    Raises:
        CheckpointError: not a name of the demo's layout.
    """
    parts = name.split(".")
    if parts[0] == _HEAD[1] and len(parts) > 1:
        return ".".join([_HEAD[0], *_leaf(parts[1:], _FROM_LEAF)])
    if len(parts) < 2 or parts[0] not in _FROM_TOP:
        raise _unknown(name, "a name of the demo (embed, layers.N, norm or head)")
    top, rest = parts[0], parts[1:]
    if top == "layers":
        rest = _layer(rest, _FROM_LAYER, _FROM_BLOCK, _FROM_LEAF, (_ROUTER[1], _ROUTER[0]))
    else:
        rest = _leaf(rest, _FROM_LEAF)
    return ".".join(["model", _FROM_TOP[top], *rest])


def rename_expert(name: str, expert: int) -> str:
    """The name as routed expert ``expert``: ``...experts.5.up_proj.weight`` -> ``...experts.3.up_proj.weight``."""
    parts = name.split(".")
    parts[parts.index("experts") + 1] = str(expert)
    return ".".join(parts)


def _layer(
    parts: list[str], in_layer: dict[str, str], in_block: dict[str, str], leaf: dict[str, str], router: tuple[str, str]
) -> list[str]:
    """Rename what follows ``layers``: ``[N, block, ..., leaf]``."""
    if len(parts) < 3:
        return parts
    number, block, *rest = parts
    # V3.2's indexer has the demo's names already (wq_b, wk): only its scales are renamed.
    if rest[0] != "indexer":
        rest = [*(in_block.get(part, part) for part in rest[:-1]), rest[-1]]
    rest = [*rest[:-1], router[1]] if rest[-2:] == ["gate", router[0]] else _leaf(rest, leaf)
    return [number, in_layer.get(block, block), *rest]


def _leaf(parts: list[str], leaf: dict[str, str]) -> list[str]:
    return [*parts[:-1], leaf.get(parts[-1], parts[-1])]


def _unknown(name: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "the tensor's name is not of this layout",
        where=name,
        expected=expected,
        fix="Check that the folder holds a checkpoint of the DeepSeek-V3 family.",
    )
