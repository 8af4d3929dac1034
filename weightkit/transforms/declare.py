"""The config's statements about dtypes, made to follow from the tensors."""

from __future__ import annotations

from collections.abc import Mapping

from weightkit.checkpoint.dtypes import TORCH_NAMES

#: Both spellings are in use; transformers 5 writes the second.
DTYPE_FIELDS = ("torch_dtype", "dtype")


def declare_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """The config of the same model with no tensor quantized and weights in ``dtype`` (``BF16``, ``F16`` or ``F32``)."""
    edited = {key: value for key, value in config.items() if key != "quantization_config"}
    fields = [field for field in DTYPE_FIELDS if field in edited] or [DTYPE_FIELDS[0]]
    return edited | dict.fromkeys(fields, TORCH_NAMES[dtype])
