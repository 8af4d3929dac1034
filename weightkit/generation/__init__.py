"""Text out of any checkpoint: a smoke test after each transform, and the runtime that later measurements use."""

from weightkit.generation.plan import GenerationPlan
from weightkit.generation.prompts import read_prompts
from weightkit.generation.result import Generation
from weightkit.generation.runtime import Runtime, Stream, generate
from weightkit.generation.sampling import Sampling
from weightkit.generation.tokenizer import TextStream, Tokenizer

__all__ = [
    "Generation",
    "GenerationPlan",
    "Runtime",
    "Sampling",
    "Stream",
    "TextStream",
    "Tokenizer",
    "generate",
    "read_prompts",
]
