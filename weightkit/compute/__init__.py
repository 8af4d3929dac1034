"""From lazy tensors to bytes: evaluation on the CPU or a GPU. The writer and the model both read through it."""

from weightkit.compute.engines import CpuEngine, CudaEngine, Engine, PackedWeight, choose_engine
from weightkit.compute.evaluate import evaluate, read_packed, strip_bytes, strips

__all__ = [
    "CpuEngine",
    "CudaEngine",
    "Engine",
    "PackedWeight",
    "choose_engine",
    "evaluate",
    "read_packed",
    "strip_bytes",
    "strips",
]
