"""What a model costs before anything is fetched: GPU memory by rank and format, disk and time by route. No torch.

source.py      which model: a manifest's name or a checkpoint's path
forms.py       the formats it can be had in: as published, cast, quantized
weights.py     bytes by part, and what one rank of several holds of them
memory.py      what lies beside the weights: latent KV cache, activations
engines.py     what vLLM and SGLang are known not to load
sharding.py    what ranks' files are made from and hold
routes.py      what each command reads, writes and takes
plan.py        all of it, held against the GPUs there are
render.py      for a terminal
"""

from weightkit.sizing.memory import Load
from weightkit.sizing.plan import Machine, SizingPlan, plan

__all__ = ["Load", "Machine", "SizingPlan", "plan"]
