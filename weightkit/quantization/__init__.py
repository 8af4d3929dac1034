"""From FP8 or BF16 weights to int4 (GPTQ), calibrated with text."""

from weightkit.quantization.calibration import Calibration, default_calibration, load_calibration

__all__ = ["Calibration", "default_calibration", "load_calibration"]
