"""Weights read from a checkpoint: values, dtypes, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import plain_reference
import pytest
import torch
from small_checkpoint import computed_tensors, write_small
from tiny import V3_INT4, Gptq, Tiny, gptq_weight, write_tiny

from weightkit.checkpoint.tensors import size_bytes
from weightkit.errors import GenerationError, MissingTensorError, ScaleError
from weightkit.layouts import open_checkpoint
from weightkit.model import CheckpointWeights
from weightkit.model.memory import Arena, Shelf

ROUTER = ("gate.weight", "e_score_correction_bias")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("weights") / "fp8"
    return folder, write_small(folder)


def test_every_weight_has_the_value_of_its_bf16_cast(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, stored = small
    with CheckpointWeights(open_checkpoint(folder), device="cpu") as weights:
        for name, expected in computed_tensors(stored).items():
            found = weights.get(name)
            assert found.dtype == torch.float32
            assert torch.equal(found, expected), name
    assert weights.bytes_read == sum(tensor.nbytes for tensor in stored.values())


def test_bf16_compute_keeps_routers_f32(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, stored = small
    with CheckpointWeights(open_checkpoint(folder), device="cpu", dtype="bf16") as weights:
        for name in computed_tensors(stored):
            assert weights.get(name).dtype == (torch.float32 if name.endswith(ROUTER) else torch.bfloat16), name


def test_large_weights_are_read_in_strips(
    small: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, stored = small
    monkeypatch.setattr("weightkit.model.loading.STRIP_BYTES", 1 << 12)
    with CheckpointWeights(open_checkpoint(folder), device="cpu") as weights:
        for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"):
            assert torch.equal(weights.get(name), computed_tensors(stored)[name])


def test_rows_read_only_rows(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, stored = small
    name = "model.embed_tokens.weight"
    ids = torch.tensor([[5, 0, 5], [263, 1, 2]])
    with CheckpointWeights(open_checkpoint(folder), device="cpu") as weights:
        found = weights.rows(name, ids)
        assert torch.equal(found, stored[name].float()[ids])
        assert weights.bytes_read == 5 * stored[name].shape[1] * 2  # five different rows of BF16
        weights.get(name)
        before = weights.bytes_read
        assert torch.equal(weights.rows(name, ids), found)
        assert weights.bytes_read == before


def test_prefetched_weights_are_read_once(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, stored = small
    names = [name for name in stored if ".layers.1." in name and not name.endswith("_scale_inv")]
    with CheckpointWeights(open_checkpoint(folder), device="cpu", jobs=3) as weights:
        weights.prefetch(names)
        for name in names:
            assert torch.equal(weights.get(name), computed_tensors(stored)[name])
        read = sum(tensor.nbytes for name, tensor in stored.items() if ".layers.1." in name)
        assert weights.bytes_read == read
        weights.prefetch(names)
        assert weights.bytes_read == read


def test_an_error_of_a_prefetched_weight_is_raised_where_it_is_used(
    small: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    with CheckpointWeights(open_checkpoint(small[0]), device="cpu") as weights:
        weights.prefetch(["model.norm.weight", "no.such.weight"])
        weights.get("model.norm.weight")
        with pytest.raises(MissingTensorError, match=r"no\.such\.weight"):
            weights.get("no.such.weight")


def test_missing_scale_is_found_before_any_read(tmp_path: Path) -> None:
    stored = write_small(tmp_path / "whole", num_hidden_layers=1)
    name = "model.layers.0.self_attn.o_proj.weight"
    del stored[f"{name}_scale_inv"]
    write_small(tmp_path / "broken", stored=stored, num_hidden_layers=1)
    with pytest.raises(ScaleError, match=name):
        CheckpointWeights(open_checkpoint(tmp_path / "broken"), device="cpu")


def test_unknown_dtype_is_refused(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(GenerationError, match="bf16, f16, f32"):
        CheckpointWeights(open_checkpoint(small[0]), device="cpu", dtype="fp4")


PACKED = {
    "int4": Gptq(),
    "activation order, asymmetric, v2": Gptq(act_order=True, sym=False, checkpoint_format="gptq_v2"),
    "int8": Gptq(bits=8, group_size=-1),
}


def write_packed(folder: Path, gptq: Gptq) -> dict[str, torch.Tensor]:
    """A GPTQ checkpoint; returns the F32 values of its experts, by hand: rounded once to BF16, as its config says."""
    model: Tiny = replace(V3_INT4, gptq=gptq, mtp_layers=0)
    contents = write_tiny(folder, model)
    modules = [name.removesuffix(".qweight") for name in contents if name.endswith(".qweight")]
    assert modules
    values = {}
    for module in modules:
        bits = plain_reference.round_to(gptq_weight(contents, module, gptq), "BF16").astype(np.uint32) << 16
        values[f"{module}.weight"] = torch.from_numpy(bits.view(np.float32))
    return values


@pytest.mark.parametrize("variant", PACKED)
def test_gptq_weights_have_the_value_of_their_bf16_cast(variant: str, tmp_path: Path) -> None:
    values = write_packed(tmp_path / "packed", PACKED[variant])
    with CheckpointWeights(open_checkpoint(tmp_path / "packed"), device="cpu") as weights:
        weights.prefetch(list(values))
        for name, expected in values.items():
            assert torch.equal(weights.get(name), expected), name


def test_gptq_weights_are_read_packed(tmp_path: Path) -> None:
    name, *_ = write_packed(tmp_path / "packed", Gptq())
    checkpoint = open_checkpoint(tmp_path / "packed")
    stored = [checkpoint[f"{name.removesuffix('.weight')}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")]
    with CheckpointWeights(checkpoint, device="cpu") as weights:
        weights.get(name)
        assert weights.bytes_read == sum(map(size_bytes, stored))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", PACKED)
def test_gpu_unpacks_to_the_same_bits(variant: str, tmp_path: Path) -> None:
    values = write_packed(tmp_path / "packed", PACKED[variant])
    with CheckpointWeights(open_checkpoint(tmp_path / "packed"), device="cuda", dtype="f32") as weights:
        for name, expected in values.items():
            assert torch.equal(weights.get(name).cpu(), expected), name


def arena(size_bytes: int, chunk_bytes: int | None = None) -> Arena:
    return Arena(size_bytes, lambda count: torch.zeros(count, dtype=torch.uint8), chunk_bytes)


def test_regions_do_not_overlap_and_join_again() -> None:
    memory = arena(13 * 256)
    regions = [memory.take(count) for count in (256, 700, 1, 2000)]
    assert memory.take(1) is None
    taken = [region for region in regions if region is not None]
    assert len(taken) == 4
    for number, region in enumerate(taken):
        memory.view(region, region.size)[:] = number
    assert [memory.view(region, 1).item() for region in taken] == [0, 1, 2, 3]
    for place in (1, 3, 0, 2):
        memory.give(taken[place])
    assert memory.used_bytes == 0
    assert memory.take(13 * 256) is not None


def test_an_arena_allocates_whole_chunks_as_they_are_needed() -> None:
    memory = arena(2500, chunk_bytes=1024)
    assert memory.allocated_bytes == 0
    assert memory.take(1025) is None
    assert [memory.take(600) is None for _ in range(3)] == [False, False, True]
    assert memory.allocated_bytes == 2048


def shelf(units: int, always: int = 0, **weights: int | None) -> Shelf:
    """Room for so many units of 256 bytes; weights by name with the layer that they are experts of, or None."""
    found = Shelf(arena(256 * units), 256 * always)
    for key, layer in weights.items():
        region = found.arena.take(256)
        assert region is not None
        found.add(key, region, layer)
    return found


def leavers(found: Shelf, count: int) -> list[str | None]:
    names: list[str | None] = []
    for _ in range(count):
        names.append(found.first_to_leave(lambda key: True))
        if names[-1] is not None:
            found.remove(names[-1])
    return names


def test_experts_leave_by_last_use_from_the_layer_that_has_most() -> None:
    found = shelf(5, a=3, b=3, c=3, d=4, e=4)
    found.use("a")
    assert leavers(found, 1) == ["b"]
    assert leavers(found, 4) == ["c", "d", "a", "e"]
    assert found.arena.used_bytes == 0


def test_what_may_not_leave_stays() -> None:
    found = shelf(3, a=3, b=3, c=4)
    assert found.first_to_leave(lambda key: key != "a") == "b"
    assert found.first_to_leave(lambda key: False) is None


def test_what_every_token_needs_stays_as_far_as_it_is_allowed_to() -> None:
    found = shelf(4, always=2, a=None, b=None, c=None, d=3)
    assert found.layer_of("c") is None
    assert sorted(map(str, leavers(found, 3))) == ["None", "c", "d"]
    assert set(found) == {"a", "b"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_gpu_gives_the_same_bits(small: tuple[Path, dict[str, torch.Tensor]], dtype: str) -> None:
    folder, stored = small
    checkpoint = open_checkpoint(folder)
    with (
        CheckpointWeights(checkpoint, device="cpu", dtype=dtype) as expected,
        CheckpointWeights(checkpoint, device="cuda", dtype=dtype) as found,
    ):
        names = list(computed_tensors(stored))
        found.prefetch(names)
        for name in names:
            assert found.get(name).is_cuda
            assert torch.equal(found.get(name).cpu(), expected.get(name)), name
