"""From FP8 or BF16 weights to int4 (GPTQ), calibrated with text."""

from weightkit.quantization.api import quantize
from weightkit.quantization.calibration import Calibration, default_calibration, load_calibration
from weightkit.quantization.report import QuantizationReport
from weightkit.quantization.settings import Settings

__all__ = ["Calibration", "QuantizationReport", "Settings", "default_calibration", "load_calibration", "quantize"]
