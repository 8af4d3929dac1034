"""The config's statements about dtypes and layers, made to follow from the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.dtypes import TORCH_NAMES
from weightkit.checkpoint.folder import SideFile
from weightkit.checkpoint.json_file import json_bytes
from weightkit.checkpoint.tensors import LazyTensor, size_bytes
from weightkit.family import QUANTIZE_CONFIG_NAME, Architecture

#: Both spellings are in use; transformers 5 writes the second.
DTYPE_FIELDS = ("torch_dtype", "dtype")
MTP_FIELD = "num_nextn_predict_layers"
QUANTIZATION_FIELD = "quantization_config"
#: What weights are stored in, by ``quant_method``.
QUANTIZED_DTYPES = {"fp8": "F8_E4M3", "gptq": "I32"}


def declare_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """The config of the same model with no tensor quantized and weights in ``dtype`` (``BF16``, ``F16`` or ``F32``)."""
    edited = {key: value for key, value in config.items() if key != QUANTIZATION_FIELD}
    fields = [field for field in DTYPE_FIELDS if field in edited] or [DTYPE_FIELDS[0]]
    return edited | dict.fromkeys(fields, TORCH_NAMES[dtype])


def declare_no_mtp(config: Mapping[str, object]) -> dict[str, object]:
    """The config of the same model without MTP layers."""
    return {key: 0 if key == MTP_FIELD else value for key, value in config.items()}


def without_stale_quantization(config: Mapping[str, object], tensors: Iterable[LazyTensor]) -> Mapping[str, object]:
    """The config, which declares FP8 or GPTQ only if one of the tensors is. Tools that cast and copy the config leave
    it so."""
    quantization = config.get(QUANTIZATION_FIELD)
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    stored = QUANTIZED_DTYPES.get(method) if isinstance(method, str) else None
    if stored is None:
        return config
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype == stored:
            return config
        sizes[tensor.dtype] += size_bytes(tensor)
    floats = {dtype: size for dtype, size in sizes.items() if dtype in TORCH_NAMES}
    return declare_dtype(config, max(floats, key=floats.__getitem__)) if floats else config


def declare_in_side_files(config: Mapping[str, object], sides: Mapping[str, SideFile]) -> dict[str, SideFile]:
    """The side files, with a ``quantize_config.json`` exactly if the config declares GPTQ: the same dictionary."""
    quantization = config.get(QUANTIZATION_FIELD)
    found = {name: file for name, file in sides.items() if name != QUANTIZE_CONFIG_NAME}
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == "gptq":
        found[QUANTIZE_CONFIG_NAME] = SideFile(content=json_bytes(dict(quantization)))
    return found


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """What the config says of these tensors. Raises ``ConfigError`` and ``UnsupportedError``."""
    config = without_stale_quantization(checkpoint.config, checkpoint.tensors.values())
    return Architecture.from_config(config, where=f"the config of {checkpoint.root}")
