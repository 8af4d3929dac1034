"""From lazy tensors to bytes: evaluation on the CPU or a GPU. The writer and the model both read through it."""

from weightkit.compute.engines import CpuEngine, CudaEngine, Engine, choose_engine
from weightkit.compute.evaluate import evaluate, strips

__all__ = ["CpuEngine", "CudaEngine", "Engine", "choose_engine", "evaluate", "strips"]
