"""Text out of any checkpoint: a smoke test after each transform, and the runtime that later measurements use."""

from weightkit.generation.runtime import Generation, Runtime, Stream, generate
from weightkit.generation.sampling import Sampling
from weightkit.generation.tokenizer import TextStream, Tokenizer

__all__ = ["Generation", "Runtime", "Sampling", "Stream", "TextStream", "Tokenizer", "generate"]
