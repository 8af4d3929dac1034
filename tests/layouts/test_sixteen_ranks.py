"""Sixteen ranks, the degree of DeepSeek's own instructions: each rank's file is its part of every tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from folders import read_safetensors
from tiny import V3, Tiny, write_tiny

import weightkit as wk

RANKS = 16
#: Wide enough for 16 ranks of whole blocks.
WIDE: Tiny = replace(
    V3, layers=2, mtp_layers=0, v=128, nope=128, rope=128, intermediate=2048, moe=1024, shared=2, experts=16, hidden=256
)


def test_parts_are_those_of_the_matrices(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "fp8", WIDE)
    source = wk.open_checkpoint(tmp_path / "fp8")
    wk.write(wk.shard(source, mp=RANKS), tmp_path / "mp16", progress=False, device="cpu")
    files = [read_safetensors(tmp_path / f"mp16/model{rank}-mp16.safetensors") for rank in range(RANKS)]
    for name, ours in {
        "model.layers.0.self_attn.o_proj.weight": "layers.0.attn.wo.weight",
        "model.layers.0.self_attn.o_proj.weight_scale_inv": "layers.0.attn.wo.scale",
        "model.layers.0.mlp.down_proj.weight": "layers.0.ffn.w2.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight": "layers.1.ffn.shared_experts.w2.weight",
    }.items():
        dtype, shape, raw = contents[name]
        whole = np.frombuffer(raw, "<f4" if dtype == "F32" else np.uint8).reshape(shape)
        width = shape[1] // RANKS
        for rank, file in enumerate(files):
            part = np.ascontiguousarray(whole[:, rank * width : (rank + 1) * width])
            assert file[ours] == (dtype, part.shape, part.tobytes()), (name, rank)
    merged = wk.open_checkpoint(tmp_path / "mp16")
    wk.write(merged, tmp_path / "merged", progress=False, device="cpu")
    with wk.checkpoint.Reader() as reader:
        again = wk.open_checkpoint(tmp_path / "merged")
        assert all(reader.read(again[name]).tobytes() == reader.read(source[name]).tobytes() for name in source.tensors)
