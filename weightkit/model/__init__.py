"""The forward pass of the family in plain torch: MLA, MoE, weights fetched lazily by their published names."""

from __future__ import annotations

from weightkit.model.attention import Attention
from weightkit.model.cache import LatentCache, LayerCache
from weightkit.model.checkpoint_weights import CheckpointWeights
from weightkit.model.mlp import Dispatch, GatedMLP, MoE
from weightkit.model.model import AfterLayer, Layer, Model
from weightkit.model.norm import rms_norm
from weightkit.model.parallel import ALONE, Parallel
from weightkit.model.rope import Rope, Rotation
from weightkit.model.weights import Held, Observer, TensorWeights, Weights, project

__all__ = [
    "ALONE",
    "AfterLayer",
    "Attention",
    "CheckpointWeights",
    "Dispatch",
    "GatedMLP",
    "Held",
    "LatentCache",
    "Layer",
    "LayerCache",
    "MoE",
    "Model",
    "Observer",
    "Parallel",
    "Rope",
    "Rotation",
    "TensorWeights",
    "Weights",
    "project",
    "rms_norm",
]
