"""Products with weights as they are stored: the same bits from any budgets, close to those of dequantized weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreted import interpreted_copy
from plain_kernels import PlainKernels
from threads import one_thread  # noqa: F401 - a fixture
from tiny import V3, V3_INT4, Gptq, write_tiny

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.tensors import GroupDequantized, Stored
from weightkit.errors import SpaceError
from weightkit.kernels.gemm_plan import TileConfig
from weightkit.layouts import open_checkpoint
from weightkit.model import CheckpointWeights, Held, Model, MoE
from weightkit.model.products import Form, Groups, Products, groups_of
from weightkit.transforms import cast

SMALL = {"layers": 2, "mtp_layers": 0}
FORMS = {
    "fp8": replace(V3, **SMALL),
    "int4": replace(V3_INT4, **SMALL),
    "int8": replace(V3_INT4, gptq=Gptq(bits=8, group_size=32, checkpoint_format="gptq_v2"), **SMALL),
    "act-order": replace(V3_INT4, gptq=Gptq(act_order=True), **SMALL),
    "asymmetric": replace(V3_INT4, gptq=Gptq(sym=False), **SMALL),
}
MLP = "model.layers.1.mlp"
EXPERTS = [f"{MLP}.experts.{number}.{module}_proj.weight" for number in range(8) for module in ("gate", "up", "down")]


@pytest.fixture
def products() -> Products:
    kernels = PlainKernels()
    return Products(kernels, kernels)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Products]:
    with interpreted_copy("fp8_gemm") as fp8, interpreted_copy("int4_gemm") as int4:
        yield Products(fp8, int4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("products")
    for form, model in FORMS.items():
        write_tiny(folder / form, model)
    return {form: open_checkpoint(folder / form) for form in FORMS}


def opened(
    checkpoint: Checkpoint, products: Products | None, memory: int | None = None, host: int = 0
) -> CheckpointWeights:
    weights = CheckpointWeights(checkpoint, device="cpu", dtype="bf16", memory_bytes=memory, host_bytes=host, jobs=2)
    weights.products = products
    return weights


def random_rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)).bfloat16()


def budgets(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Device and host memory: for all, for half, for two matrices of an expert, for none."""
    with CheckpointWeights(checkpoint, device="cpu") as weights:
        packed, one = weights.packed_bytes, weights.sizes.largest_expert
    return {"half": (packed // 2, 0), "two": (2 * one + 600, 0), "none": (0, 0), "host": (4 * one, packed // 2)}


@pytest.mark.parametrize(("form", "tokens"), [("int4", 1), *((form, 3) for form in FORMS)])
def test_experts_do_not_depend_on_memory(
    checkpoints: dict[str, Checkpoint], products: Products, form: str, tokens: int
) -> None:
    checkpoint, x = checkpoints[form], random_rows(tokens, 144)
    with opened(checkpoint, products, 1 << 30) as weights:
        moe = MoE(weights.arch, MLP, weights)
        ids, shares = moe.route(x)
        expected = moe.experts(x, ids, shares)
        assert weights.multiplies_stored
        assert not weights.is_resident
        assert moe._together(moe.dispatch(ids), range(8)) is weights
    with opened(checkpoint, None, 1 << 30) as weights:
        assert weights.is_resident
        dense = MoE(weights.arch, MLP, weights).experts(x, ids, shares)
    size = float(dense.float().square().mean().sqrt())
    assert float((expected.float() - dense.float()).square().mean().sqrt()) < 2.0**-7 * size
    for name, (memory, host) in budgets(checkpoint).items():
        with opened(checkpoint, products, memory, host) as weights:
            moe = MoE(weights.arch, MLP, weights)
            assert torch.equal(moe.experts(x, ids, shares), expected), name
            assert torch.equal(moe.experts(x, ids, shares), expected), name
            assert weights.kept_bytes <= memory


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_experts_one_by_one_are_close(
    checkpoints: dict[str, Checkpoint], products: Products, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same experts by themselves, as where one has many tokens; and with an observer, which sees each input."""
    x = random_rows(7, 144)
    with opened(checkpoints[form], products) as weights:
        moe = MoE(weights.arch, MLP, weights)
        ids, shares = moe.route(x)
        together = moe.experts(x, ids, shares).float()
        seen: dict[str, torch.Tensor] = {}
        observed = MoE(weights.arch, MLP, weights, observe=seen.__setitem__).experts(x, ids, shares).float()
        monkeypatch.setattr("weightkit.model.mlp.GROUP_TOKENS", 0)
        alone = moe.experts(x, ids, shares).float()
    assert torch.equal(observed, alone)
    assert {name for name in seen if "gate_proj" in name} == {
        f"{MLP}.experts.{number}.gate_proj.weight" for number in ids.unique().tolist()
    }
    assert float((together - alone).square().mean().sqrt()) < 2.0**-7 * float(alone.square().mean().sqrt())


@pytest.mark.parametrize("form", ["fp8", "int4", "act-order"])
def test_the_whole_model_does_not_depend_on_memory(
    checkpoints: dict[str, Checkpoint], products: Products, form: str
) -> None:
    """A prompt, then one more token."""
    found = []
    for memory, host in ((1 << 30, 0), *budgets(checkpoints[form]).values()):
        with opened(checkpoints[form], products, memory, host) as weights, torch.inference_mode():
            model = Model(weights.arch, weights)
            cache = model.new_cache()
            logits = [model(torch.tensor([[3, 9, 27, 40]]), cache), model(torch.tensor([[5]]), cache)]
            found.append(torch.cat(logits, dim=1))
    assert found[0].isfinite().all()
    assert all(torch.equal(logits, found[0]) for logits in found[1:])


@pytest.mark.parametrize("form", ["fp8", "int4", "int8"])
def test_real_kernels_take_them(checkpoints: dict[str, Checkpoint], interpreted: Products, form: str) -> None:
    """A product with the stored weight differs from that with the dense one by the order of its sum."""
    x, names = random_rows(2, 144), EXPERTS[:2]
    with opened(checkpoints[form], interpreted) as weights, opened(checkpoints[form], interpreted, 0) as poor:
        assert weights.takes_groups(EXPERTS)
        assert not weights.takes_groups([*EXPERTS, "model.norm.weight"])
        both = weights.grouped(names, x, [1, 2], [1, 0])
        assert torch.equal(poor.grouped(names, x, [1, 2], [1, 0]), both)
        found = torch.cat([weights.linear(names[0], x[1:]), weights.linear(names[1], x)])
        gate, up = (weights.get(name).double() for name in names)
        exact = torch.cat([x[1:].double() @ gate.T, x.double() @ up.T])
    close = {"rtol": 2.0**-7, "atol": float(exact.abs().max()) * 2.0**-9}
    torch.testing.assert_close(found.double(), exact, **close)
    torch.testing.assert_close(both.double(), exact, **close)


def test_one_launch_where_there_is_room(checkpoints: dict[str, Checkpoint], products: Products) -> None:
    x, kernels = random_rows(1, 144), products._int4
    assert isinstance(kernels, PlainKernels)
    for memory, expected in ((1 << 30, [4, 2]), (0, [1] * 6)):
        with opened(checkpoints["int4"], products, memory) as weights:
            moe = MoE(weights.arch, MLP, weights)
            kernels.launches.clear()
            moe.experts(x, *moe.route(x))
        assert kernels.launches == expected


@pytest.mark.parametrize("form", ["act-order", "asymmetric"])
def test_weights_that_the_kernels_do_not_take_are_dequantized(
    checkpoints: dict[str, Checkpoint], products: Products, form: str
) -> None:
    x = random_rows(3, 144)
    with opened(checkpoints[form], products) as weights, opened(checkpoints[form], None) as dense:
        for name in EXPERTS[:2]:
            assert torch.equal(weights.linear(name, x), dense.linear(name, x))
        both = weights.grouped(EXPERTS[:2], x, [1, 2], [0, 1])
        assert torch.equal(both, torch.cat([dense.linear(EXPERTS[0], x[:1]), dense.linear(EXPERTS[1], x[1:])]))


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_strips(
    checkpoints: dict[str, Checkpoint], products: Products, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each strip of rows is what the kernels take."""
    monkeypatch.setattr(sys.modules["weightkit.compute.evaluate"], "GROUP_STRIP_BYTES", 1)
    checkpoint = checkpoints[form]
    x, name = random_rows(3, 128), f"{MLP}.experts.1.down_proj.weight"
    with opened(checkpoint, products) as weights:
        whole = weights.linear(name, x)
    monkeypatch.setattr("weightkit.model.stores.UNIT_BYTES", 128 * 128 * 2)  # 128 rows of 144
    with opened(checkpoint, products) as weights:
        assert len(weights._store._units(name)) == 2  # type: ignore[attr-defined]
        assert not weights.takes_groups([name])
        assert torch.equal(weights.linear(name, x), whole)


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_experts_of_ranks_add_up(
    checkpoints: dict[str, Checkpoint], products: Products, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainKernels, "experts_config", lambda *_, **__: TileConfig(splits=2))
    x, checkpoint = random_rows(3, 144), checkpoints[form]
    with opened(checkpoint, products) as weights:
        moe = MoE(weights.arch, MLP, weights)
        ids, shares = moe.route(x)
        dispatch = moe.dispatch(ids)
        whole = moe._own_experts(x, ids, shares, dispatch)
        parts = [
            moe._grouped_experts(weights, x, shares, dispatch, own)
            for own in (range(3), range(3, 8))
            if sum(dispatch.counts[own.start : own.stop])
        ]
    torch.testing.assert_close(sum(parts), whole)


def test_room_for_all_as_stored_is_enough_without_streaming(
    checkpoints: dict[str, Checkpoint], products: Products
) -> None:
    weights = opened(checkpoints["fp8"], products)
    weights._stream = False
    weights.limit(weights.packed_bytes, 0)
    assert weights.fitting_bytes == weights.packed_bytes < weights.sizes.dense
    assert not weights.is_streamed
    with pytest.raises(SpaceError, match="not to be streamed"):
        weights.limit(weights.packed_bytes - 1, 0)


@pytest.mark.parametrize("memory", [0, 60_000, 1 << 30])
def test_attention_held_for_several_parts_is_that_of_one(
    checkpoints: dict[str, Checkpoint], products: Products, memory: int
) -> None:
    """The same products, for each part, whatever takes the weights' place on the device meanwhile."""
    kernels = products._fp8
    assert isinstance(kernels, PlainKernels)
    with opened(checkpoints["fp8"], products, memory) as weights, torch.inference_mode():
        model = Model(weights.arch, weights)
        attention, caches = model.layers[0].attention, [model.new_cache().layers[0] for _ in range(4)]
        x = random_rows(1, 10, 144)
        for cache in caches:
            attention(x[:, :3], model.rope.at(torch.arange(3)), cache)
        turn, tokens = model.rope.at(torch.tensor([3])), x[:, 3:5].split(1, dim=1)
        kernels.rows.clear()
        expected = [attention(token, turn, cache) for token, cache in zip(tokens, caches[:2], strict=True)]
        assert kernels.rows == [1] * 8
        held, found = attention.holding(), []
        for token, cache in zip(tokens, caches[2:], strict=True):
            kernels.rows.clear()
            found.append(held(token, turn, cache))
            assert kernels.rows == [1] * 4
            for name in EXPERTS:
                weights.get(name)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("unit_bytes", [256 << 20, 128 * 128 * 2])
@pytest.mark.parametrize("form", ["fp8", "int4", "act-order"])
def test_held_products(
    checkpoints: dict[str, Checkpoint],
    products: Products,
    form: str,
    unit_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the source, of whole weights and of strips; the kernels turn out not to take some of them."""
    monkeypatch.setattr(sys.modules["weightkit.compute.evaluate"], "GROUP_STRIP_BYTES", 1)
    monkeypatch.setattr("weightkit.model.stores.UNIT_BYTES", unit_bytes)
    x, name = random_rows(2, 128), f"{MLP}.experts.1.down_proj.weight"
    with opened(checkpoints[form], products, 0) as weights:
        expected = weights.linear(name, x)
        held = Held(Held(weights, [name]), [name])
        before = weights.bytes_read
        found = [held.linear(name, x) for _ in range(3)]
        once = weights.bytes_read - before
        weights.linear(name, x)
        assert once == weights.bytes_read - before - once
        assert weights.held_product("model.norm.weight") is None
        room = 2 * weights.sizes.largest_expert + 600
    with opened(checkpoints[form], products, room) as weights:
        held = Held(weights, [name])
        for _ in range(2):
            found.append(held.linear(name, x))
            for other in EXPERTS:  # in its place
                weights.get(other)
    assert all(torch.equal(product, expected) for product in found)
    with opened(checkpoints[form], None, 0) as weights:
        assert weights.held_product(name) is None


@pytest.mark.parametrize("form", ["fp8", "int4", "act-order"])
@pytest.mark.parametrize("unit_bytes", [256 << 20, 128 * 128 * 2])
def test_the_least_memory_in_which_none_is_read_twice(
    checkpoints: dict[str, Checkpoint],
    products: Products,
    form: str,
    unit_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of weights in strips, each of which repeats a GPTQ weight's group numbers."""
    monkeypatch.setattr(sys.modules["weightkit.compute.evaluate"], "GROUP_STRIP_BYTES", 1)
    monkeypatch.setattr("weightkit.model.stores.UNIT_BYTES", unit_bytes)
    with opened(checkpoints[form], products) as weights:
        packed, names = weights.packed_bytes, [name for name, _ in weights._needed()]
    for memory in (packed, packed - 1):
        with opened(checkpoints[form], products, memory) as weights:
            for name in names:
                weights.get(name)
            assert weights.kept_bytes == packed if memory == packed else weights.kept_bytes < packed
            before = weights.bytes_read
            for name in names:
                weights.get(name)
            assert (weights.bytes_read == before) == (memory == packed)


def test_a_checkpoint_without_quantized_weights_is_kept_whole(
    checkpoints: dict[str, Checkpoint], products: Products
) -> None:
    with opened(cast(checkpoints["fp8"], "bf16"), products, 1 << 30) as weights:
        assert weights.multiplies_stored  # its BF16 weights are those of FP8, not yet written
    with opened(cast(checkpoints["fp8"], "f16"), products, 1 << 30) as weights:
        assert not weights.multiplies_stored
        assert weights.is_resident


def test_a_damaged_expert_is_raised_whatever_is_asked_for_with_it(tmp_path: Path, products: Products) -> None:
    write_tiny(tmp_path, FORMS["int4"])
    checkpoint = open_checkpoint(tmp_path)
    part = checkpoint[f"{MLP}.experts.1.up_proj.g_idx"]
    assert isinstance(part, Stored)
    with Path(part.path).open("r+b") as file:
        file.seek(part.offset)
        file.write(b"\xff\xff\xff\x0f")
    x = random_rows(2, 144)
    names = [f"{MLP}.experts.{number}.up_proj.weight" for number in range(3)]
    with opened(open_checkpoint(tmp_path), products) as weights:
        for _ in range(2):
            with pytest.raises(Exception, match=r"g_idx|group"):
                weights.grouped(names, x, [1, 1, 1], [0, 1, 0])
        assert weights.grouped(names[::2], x, [1, 1], [0, 1]).shape == (2, 128)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_gpu_bits_do_not_depend_on_memory(checkpoints: dict[str, Checkpoint], form: str) -> None:
    """A prompt and some tokens of three sequences; once more with all weights dequantized, which is close."""
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(2))

    def logits(memory: int | None, host: int, dense: bool = False) -> torch.Tensor:
        with (
            CheckpointWeights(checkpoints[form], device="cuda", memory_bytes=memory, host_bytes=host) as weights,
            torch.inference_mode(),
        ):
            assert weights.multiplies_stored
            assert not weights.is_resident
            if dense:
                weights.products = None
            model = Model(weights.arch, weights)
            cache = model.new_cache()
            return torch.cat([model(part, cache) for part in ids.split([6, 1, 1, 1], dim=1)], dim=1).cpu()

    expected = logits(None, 0)
    assert expected.isfinite().all()
    for name, (memory, host) in budgets(checkpoints[form]).items():
        assert torch.equal(logits(memory, max(host, 1 << 20)), expected), name
    assert torch.equal(logits(1 << 30, 0, dense=True), logits(0, 1 << 20, dense=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_gpu_experts_are_close_to_dequantized_ones(checkpoints: dict[str, Checkpoint], form: str) -> None:
    x, found = random_rows(5, 144).cuda(), []
    for dense in (False, True):
        with CheckpointWeights(checkpoints[form], device="cuda", memory_bytes=1 << 30) as weights:
            weights.products = None if dense else weights.products
            moe = MoE(weights.arch, MLP, weights)
            ids, shares = moe.route(x)
            assert (moe._together(moe.dispatch(ids), range(8)) is None) == dense
            found.append(moe.experts(x, ids, shares).float())
    assert float((found[0] - found[1]).square().mean().sqrt()) < 2.0**-7 * float(found[1].square().mean().sqrt())


# --- what is known of a GPTQ weight's values --------------------------------------------------------------------------


def gptq_lazy(k: int, groups: int, bits: int = 4, offset: int = 1) -> GroupDequantized:
    def stored(dtype: str, *shape: int) -> Stored:
        return Stored("file", 0, dtype, shape)

    per_word = 32 // bits
    return GroupDequantized(
        stored("I32", k // per_word, 16), stored("I32", groups, 16 // per_word), stored("F16", groups, 16),
        stored("I32", k), bits, offset, "BF16",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("g_idx", "groups", "expected"),
    [
        (np.arange(64) // 16, 4, 16),
        (np.arange(64) // 32, 2, 32),
        (np.arange(72) // 16, 5, 16),  # the last group is short
        (np.zeros(64), 1, -1),
        (np.arange(64)[::-1] // 16, 4, None),
        (np.arange(64) // 24, 3, None),  # no power of two
        (np.arange(64) // 4, 16, None),  # inside a word
        (np.arange(64) // 16, 8, None),  # groups that nothing is in
        (np.zeros(64), 4, None),
        ((np.arange(64) + 8) // 16, 5, None),  # begins inside a group
    ],
)
def test_groups_are_known_by_their_values(g_idx: np.ndarray, groups: int, expected: int | None) -> None:
    lazy = gptq_lazy(len(g_idx), groups)
    zeros = np.full(groups * 2, 0x77777777, np.uint32).view(np.int32)
    assert groups_of(zeros, g_idx.astype(np.int32), lazy) == (None if expected is None else Groups(expected, 8))


def test_zeros_are_known_by_their_values() -> None:
    g_idx = (np.arange(64) // 16).astype(np.int32)
    zeros = np.full(8, 0xFFFFFFFF, np.uint32).view(np.int32)
    assert groups_of(zeros, g_idx, gptq_lazy(64, 4)) == Groups(16, 0)  # one more than 15 is 0
    assert groups_of(zeros, g_idx, gptq_lazy(64, 4, offset=0)) == Groups(16, 15)
    assert groups_of(np.full(16, 0x7F7F7F7F, np.int32), g_idx, gptq_lazy(64, 4, bits=8)) == Groups(16, 128)
    assert groups_of(np.full(8, 0x7F7F7F7F, np.int32), g_idx, gptq_lazy(64, 4)) is None
    zeros[5] ^= 0x100
    assert groups_of(zeros, g_idx, gptq_lazy(64, 4)) is None


def test_forms() -> None:
    assert Form.of(gptq_lazy(64, 4)) == Form((16, 64), 4)
    assert Form.of(replace(gptq_lazy(64, 4), dtype="F16")) is None
    assert Form.of(Stored("file", 0, "BF16", (16, 64))) is None
    assert Products.of(torch.device("cpu"), torch.bfloat16) is None
