"""What this machine reaches: disk, memory, cores, GPU; and what a conversion could at best take there.

ceilings.py    the measured rates as data: saved, found again
disk.py        reading, writing, both at once, in unlinked scratch files
cores.py       memory copies, SHA-256, FP8 dequantization
gpu.py         transfers, device copies, the dequantization kernel
bench.py       all of it
estimate.py    from rates and bytes to seconds
"""

from weightkit.measure.bench import measure
from weightkit.measure.ceilings import FILE_NAME, Ceilings, GpuCeilings, find, load, save
from weightkit.measure.estimate import Estimate, Work, estimate

__all__ = ["FILE_NAME", "Ceilings", "Estimate", "GpuCeilings", "Work", "estimate", "find", "load", "measure", "save"]
