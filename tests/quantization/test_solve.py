"""The solver between kernels and report: what it says of each weight, what it refuses; and the outbox to the writer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from weightkit.errors import Interrupted, QuantizationError
from weightkit.quantization import Settings
from weightkit.quantization.clock import Clock
from weightkit.quantization.outbox import Outbox
from weightkit.quantization.packed import Packed, flat, flat_bytes, unflat
from weightkit.quantization.solver import SAMPLED_TOKENS, Hessian, Solver

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GATE, UP = (f"model.layers.1.mlp.experts.3.{module}_proj.weight" for module in ("gate", "up"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def solver(**changes: object) -> Solver:
    return Solver(Settings(**{"group_size": 16, **changes}), Clock(CPU))  # type: ignore[arg-type]


def hessian_of(x: torch.Tensor) -> Hessian:
    hessian = Hessian(x.shape[1], len(x), CPU)
    hessian.add(x)
    return hessian


# --- what is said of a weight -----------------------------------------------------------------------------------------


def test_weights_of_one_input_are_solved_as_if_each_were_alone() -> None:
    x, gate, up = random(200, 48), random(24, 48, seed=1), 30 * random(16, 48, seed=2)
    together = solver().solve([GATE, UP], [gate, up], hessian_of(x))
    for name, weight, found in zip((GATE, UP), (gate, up), together, strict=True):
        (alone,) = solver().solve([name], [weight], hessian_of(x))
        assert torch.equal(found.codes, alone.codes)
        assert torch.equal(found.scales, alone.scales)
        torch.testing.assert_close(found.fate.errors, alone.fate.errors)
        each = found.scales.repeat_interleave(16, 0)
        difference = weight.T - (found.codes.float() - 8) * each
        expected = (x @ difference).norm() / (x @ weight.T).norm()
        torch.testing.assert_close(found.fate.errors[0], expected, rtol=1e-4, atol=0)
        assert found.fate.errors[0] < found.fate.errors[1]
        assert (found.fate.damping, found.fate.retries, found.fate.note) == (0.01, 0, None)


def test_a_singular_hessian_is_damped_more_and_said() -> None:
    """Two tokens, 96 columns, and hardly any damping asked for."""
    (found,) = solver(damping=1e-9).solve([GATE], [random(8, 96)], hessian_of(random(2, 96, seed=1)))
    assert found.fate.retries >= 1
    assert found.fate.damping is not None
    assert found.fate.damping >= 1e-3
    assert found.fate.errors[0] < found.fate.errors[1]


@pytest.mark.parametrize(
    ("method", "note"), [("gptq", "no calibration token reached it"), ("rtn", None)], ids=["starved", "asked for"]
)
def test_without_inputs_a_weight_is_rounded(method: str, note: str | None) -> None:
    weight = random(8, 32)
    for hessian in (None, Hessian(32, 0, CPU)):
        (found,) = solver(method=method).solve([GATE], [weight], hessian)
        assert found.fate.note == note
        assert found.fate.damping is None
        each = found.scales.repeat_interleave(16, 0)
        assert torch.equal(found.codes, torch.floor(weight.T / each + 8.5).clamp(0, 15).to(torch.uint8))
        assert found.fate.errors[0] == found.fate.errors[1] > 0


def test_a_weight_of_zeros_has_no_error_to_speak_of() -> None:
    (found,) = solver().solve([GATE], [torch.zeros(8, 32)], hessian_of(random(100, 32)))
    assert (found.codes == 8).all()
    assert (found.scales == 1).all()
    assert torch.isnan(found.fate.errors).all()  # 0 / 0: the report has None for it


def test_inputs_may_come_in_any_parts() -> None:
    x = random(3 * SAMPLED_TOKENS + 5, 4).bfloat16().float()
    whole, parts = hessian_of(x), Hessian(4, len(x), CPU)
    for part in (*x[:100].split(7), x[100:100], x[100:]):
        parts.add(part)
    torch.testing.assert_close(whole.total, parts.total, rtol=1e-5, atol=1e-2)
    assert torch.equal(parts.sample(), whole.sample())
    assert torch.equal(whole.sample(), x[::3])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["search", "largest"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e7], ids=str)
def test_weights_that_are_not_finite_are_named(value: float, method: str, scales: str) -> None:
    good, bad = random(8, 32), random(8, 32)
    bad[3, 17] = value
    hessian = hessian_of(random(100, 32)) if method == "gptq" else None
    with pytest.raises(QuantizationError) as caught:
        solver(method=method, scales=scales).solve([GATE, UP], [good, bad], hessian)
    assert str(caught.value) == (
        f"{UP}: weights that are not finite, or too large for scales in F16.\n"
        "Check the source: weightkit verify --values lists weights that are not finite."
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25], ids=str)
def test_inputs_that_are_not_finite_are_named(value: float) -> None:
    x = random(100, 32)
    x[50, 3] = value
    with pytest.raises(QuantizationError, match="the inputs hold NaN or Inf") as caught:
        solver().solve([GATE, UP], [random(8, 32), random(8, 32)], hessian_of(x))
    assert str(caught.value).startswith(f"{GATE}: ")
    assert "verify --values" in str(caught.value)


def test_a_hessian_that_nothing_helps() -> None:
    hessian = Hessian(16, 5, CPU)
    hessian.total.fill_diagonal_(-1.0)
    hessian.total[7, 0] = 1e6
    with pytest.raises(QuantizationError, match=r"no Cholesky factor(.|\n)*Use a larger --damping"):
        solver(scales="largest").solve([GATE], [random(8, 16)], hessian)


# --- packed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_what_ranks_send_each_other_comes_back(bits: int) -> None:
    shapes, groups = [(16, 32), (8, 64), (24, 32)], [16, 64, 32]
    parts = [
        Packed.of(
            torch.randint(0, 1 << bits, (k, n), dtype=torch.uint8),
            random(k // size, n).abs() + 0.1,
            group_size=size,
            bits=bits,
        )
        for (n, k), size in zip(shapes, groups, strict=True)
    ]
    content = flat(parts)
    assert len(content) == flat_bytes(shapes, groups, bits)
    for found, expected in zip(unflat(content, shapes, groups, bits), parts, strict=True):
        for (name, ours), (other, theirs) in zip(found.stored("m"), expected.stored("m"), strict=True):
            assert name == other
            assert torch.equal(ours, theirs)


# --- outbox -----------------------------------------------------------------------------------------------------------


def test_the_outbox_waits_for_what_is_not_there_yet() -> None:
    outbox = Outbox()
    outbox.put("b", torch.arange(3, dtype=torch.int32))
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(lambda: [outbox.take("a").tobytes(), outbox.take("b").tobytes()])
        time.sleep(0.05)
        assert not taking.done()
        outbox.put("a", torch.ones(2, 2, dtype=torch.float16).T)
        assert taking.result(60) == [b"\x00\x3c" * 4, b"\x00\0\0\0\x01\0\0\0\x02\0\0\0"]


def test_a_file_waits_until_it_is_allowed() -> None:
    outbox, went_on = Outbox(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: (outbox.settle("file"), went_on.set()))
        outbox.allow("another")
        assert not went_on.wait(0.05)
        outbox.allow("file")
        waiting.result(60)
    assert went_on.is_set()


def test_who_waits_when_it_closes_is_told() -> None:
    outbox = Outbox()
    outbox.put("there", torch.zeros(1))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(outbox.take, "not there"), pool.submit(outbox.settle, "file")]
        time.sleep(0.05)
        outbox.close()
        for future in waiting:
            with pytest.raises(Interrupted, match="stopped before it was"):
                future.result(60)
    assert len(outbox.take("there")) == 4
