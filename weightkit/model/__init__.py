"""The forward pass of the family in plain torch: absorbed MLA, MoE, weights fetched lazily by their published names."""

from __future__ import annotations

from weightkit.model.attention import Attention
from weightkit.model.cache import LatentCache, LayerCache
from weightkit.model.checkpoint_weights import CheckpointWeights
from weightkit.model.mlp import GatedMLP, MoE
from weightkit.model.model import AfterLayer, Layer, Model
from weightkit.model.norm import rms_norm
from weightkit.model.rope import Rope, Rotation
from weightkit.model.weights import Observer, TensorWeights, Weights, project

__all__ = [
    "AfterLayer",
    "Attention",
    "CheckpointWeights",
    "GatedMLP",
    "LatentCache",
    "Layer",
    "LayerCache",
    "MoE",
    "Model",
    "Observer",
    "Rope",
    "Rotation",
    "TensorWeights",
    "Weights",
    "project",
    "rms_norm",
]
