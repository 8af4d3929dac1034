"""The config's statements about dtypes and layers, made to follow from the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.dtypes import TORCH_NAMES
from weightkit.checkpoint.tensors import LazyTensor, size_bytes
from weightkit.family import Architecture

#: Both spellings are in use; transformers 5 writes the second.
DTYPE_FIELDS = ("torch_dtype", "dtype")
MTP_FIELD = "num_nextn_predict_layers"


def declare_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """The config of the same model with no tensor quantized and weights in ``dtype`` (``BF16``, ``F16`` or ``F32``)."""
    edited = {key: value for key, value in config.items() if key != "quantization_config"}
    fields = [field for field in DTYPE_FIELDS if field in edited] or [DTYPE_FIELDS[0]]
    return edited | dict.fromkeys(fields, TORCH_NAMES[dtype])


def declare_no_mtp(config: Mapping[str, object]) -> dict[str, object]:
    """The config of the same model without MTP layers."""
    return {key: 0 if key == MTP_FIELD else value for key, value in config.items()}


def without_stale_fp8(config: Mapping[str, object], tensors: Iterable[LazyTensor]) -> Mapping[str, object]:
    """The config, which declares FP8 only if one of the tensors is. Tools that cast and copy the config leave it so."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return config
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype == "F8_E4M3":
            return config
        sizes[tensor.dtype] += size_bytes(tensor)
    floats = {dtype: size for dtype, size in sizes.items() if dtype in TORCH_NAMES}
    return declare_dtype(config, max(floats, key=floats.__getitem__)) if floats else config


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """What the config says of these tensors. Raises ``ConfigError`` and ``UnsupportedError``."""
    config = without_stale_fp8(checkpoint.config, checkpoint.tensors.values())
    return Architecture.from_config(config, where=f"the config of {checkpoint.root}")
