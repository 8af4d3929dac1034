"""From lazy tensors to bytes: evaluation on the CPU or a GPU. The writer and the model both read through it."""

from weightkit.compute.engines import (
    CpuEngine,
    CudaEngine,
    Engine,
    EngineSupply,
    PackedWeight,
    Started,
    choose_engine,
)
from weightkit.compute.evaluate import evaluate, read_packed, start, strip_bytes, strips
from weightkit.compute.scales import KeptScales
from weightkit.compute.starting import StartingEngine, open_engine, start_engine

__all__ = [
    "CpuEngine",
    "CudaEngine",
    "Engine",
    "EngineSupply",
    "KeptScales",
    "PackedWeight",
    "Started",
    "StartingEngine",
    "choose_engine",
    "evaluate",
    "open_engine",
    "read_packed",
    "start",
    "start_engine",
    "strip_bytes",
    "strips",
]
