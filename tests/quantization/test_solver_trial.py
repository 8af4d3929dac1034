"""The solver's trial: sound kernels pass it whatever the settings, and each that is broken is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from standin_gpu import GPU, StandIn, standin_gpu
from threads import one_thread  # noqa: F401 - a fixture
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.compute import CpuEngine
from weightkit.errors import DeviceError
from weightkit.kernels import gptq_format, gptq_solve
from weightkit.quantization import job
from weightkit.quantization.packed import Packed
from weightkit.quantization.plan import plan_quantization
from weightkit.quantization.settings import Settings
from weightkit.quantization.trial import COLUMNS, OUTPUTS, try_solver

CPU = torch.device("cpu")


def broken(name: str, spoil: Callable[..., Any]) -> ModuleType:
    """The solver with one function, whose result, or first argument where it has none, is spoiled."""
    module, sound = ModuleType("broken"), getattr(gptq_solve, name)
    vars(module).update(vars(gptq_solve))

    def function(*arguments: Any, **options: Any) -> Any:
        found = sound(*arguments, **options)
        spoil(arguments[0] if found is None else found)
        return found

    setattr(module, name, function)
    return module


def one_up(place: tuple[int, int], step: float) -> Callable[[torch.Tensor], None]:
    def spoil(made: torch.Tensor) -> None:
        made[place] += step if made[place] < 12 else -step

    return spoil


SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(bits=8, group_size=-1, order="none", damping=1e-6),
        Settings(group_size=48, scales="largest"),
        Settings(method="rtn", group_size=1024),
    ],
    ids=lambda settings: "-".join(settings.form),
)


@SETTINGS
def test_a_sound_solver_passes(settings: Settings) -> None:
    try_solver(settings, CPU)


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    """A GPU whose kernels compute what their launchers do on a CPU."""

    def gram(_: object, rows: torch.Tensor, hessian: torch.Tensor, *__: int, **___: int) -> None:
        gptq_solve.add_gram(hessian, rows)

    def reordered(
        _: object, hessian: torch.Tensor, order: torch.Tensor, out: torch.Tensor, added: torch.Tensor, *__: int,
        **___: int,
    ) -> None:  # fmt: skip
        out.copy_(gptq_solve.reorder(hessian, order, added))

    def round_columns(_: object, *arguments: Any, TOP: int, **__: int) -> None:
        *operands, _n, _k, start, count = arguments
        gptq_solve.round_columns(*operands, start, start + count, TOP.bit_length())

    def search(
        _: object, weight: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, _n: int, group_size: int,
        _k: int, *, TOP: int, **__: Any,
    ) -> None:  # fmt: skip
        grid = {"group_size": group_size, "bits": TOP.bit_length()}
        scales.copy_(gptq_solve.search_scales(weight, importance, **grid))

    def dequant(_: object, *arguments: Any, BITS: int, OFFSET: int, **__: Any) -> None:
        *operands, out, _n, _k, _groups = arguments
        out.copy_(gptq_format.dequant_reference(*operands, BITS, OFFSET).view(out.dtype))

    with standin_gpu() as gpu:
        for name, kernel in {
            "_gram_kernel": gram,
            "_reorder_kernel": reordered,
            "_round_columns_kernel": round_columns,
            "_search_scales_kernel": search,
        }.items():
            gpu.replace(gptq_solve, name, kernel)
        gpu.replace(gptq_format, "_dequant_kernel", dequant)
        yield gpu


@SETTINGS
def test_on_a_gpu_nothing_is_computed_on_two_devices(settings: Settings, gpu: StandIn) -> None:
    try_solver(settings, GPU)
    solving = {"_gram_kernel", "_reorder_kernel", "_round_columns_kernel", "_dequant_kernel"}
    searching = {"_search_scales_kernel"} if settings == Settings() else set()
    assert set(gpu.launched) == searching | (solving if settings.method == "gptq" else set())


@pytest.mark.parametrize(("settings", "step"), [(Settings(), 1), (Settings(bits=8, group_size=16), -1)])
def test_scales_may_round_to_the_next_of_f16(settings: Settings, step: int) -> None:
    """Where what is rounded is off by the last bit of a division, which a GPU takes the liberty of."""

    def tip(scales: torch.Tensor) -> None:
        scales.copy_((scales.half().view(torch.int16) + step).view(torch.float16).float())

    try_solver(settings, CPU, broken("search_scales", tip))


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("search_scales", one_up((1, 7), 2.0**-6), "1 of 192 scales"),
        ("add_gram", one_up((9, 3), 1.0), f"1 of {COLUMNS**2:,} sums of inputs"),
        ("reorder", one_up((9, 3), 1.0), "sums in their order"),
        ("factorize", lambda factor: factor.ratios[50, 3].add_(0.01), "ratios"),
        ("solve", one_up((200, 5), 1), f"of {COLUMNS * OUTPUTS:,} codes"),
    ],
)
def test_each_broken_kernel_is_found(name: str, spoil: Callable[..., Any], says: str) -> None:
    with pytest.raises(DeviceError, match=says) as raised:
        try_solver(Settings(), CPU, broken(name, spoil))
    assert str(raised.value).startswith("cpu: the GPU quantizes otherwise than plain torch")
    assert "--device cpu" in str(raised.value)


def test_rounding_to_nearest_is_tried_without_a_hessian() -> None:
    def fail(made: object) -> None:
        raise AssertionError

    try_solver(Settings(method="rtn"), CPU, broken("add_gram", fail))
    with pytest.raises(DeviceError, match=f"1 of {COLUMNS * OUTPUTS:,} codes"):
        try_solver(Settings(method="rtn"), CPU, broken("round_to_nearest", one_up((200, 5), 1)))


def test_codes_that_are_unpacked_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sound, calls = Packed.weight, list[None]()

    def weight(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        calls.append(None)
        made = sound(packed, dtype)
        return made * 2 if len(calls) == 1 else made

    monkeypatch.setattr(Packed, "weight", weight)
    with pytest.raises(DeviceError, match="weights of packed codes"):
        try_solver(Settings(), CPU)
    try_solver(Settings(method="rtn"), CPU)  # which computes with none of them


def test_codes_that_are_packed_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sound, calls = gptq_format.pack, list[None]()

    def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
        calls.append(None)
        return sound(codes, bits) ^ (len(calls) == 1)

    monkeypatch.setattr(gptq_format, "pack", pack)
    with pytest.raises(DeviceError, match="words of packed codes"):
        try_solver(Settings(method="rtn"), CPU)


def test_whatever_fails_is_a_device_error() -> None:
    def fail(made: object) -> None:
        raise ArithmeticError("the Hessian has no Cholesky factor\nand more")

    with pytest.raises(DeviceError, match="cpu: the GPU cannot be used: found ArithmeticError: the Hessian"):
        try_solver(Settings(), CPU, broken("factorize", fail))


def test_a_job_on_a_gpu_begins_with_both_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what integers are made from, in F32, and of what is computed with, in BF16."""
    write_tiny(tmp_path / "source", V3)
    settings = Settings(group_size=16)
    plan = plan_quantization(
        wk.open_checkpoint(tmp_path / "source"), tmp_path / "out", settings, calibration="none", version="0"
    )
    asked = list[object]()

    def open_engine(device: str, work: object = ()) -> CpuEngine:
        asked.append((device, {tensor.dtype for tensor in work}))  # type: ignore[attr-defined]
        return CpuEngine()

    monkeypatch.setattr(job, "open_engine", open_engine)
    monkeypatch.setattr(job, "try_solver", lambda *arguments: asked.append(arguments))
    job._tried_engine(torch.device("cuda", 1), plan)
    job._tried_engine(CPU, plan)
    (device, dtypes), solver, cpu = asked  # type: ignore[misc]
    assert (device, solver, cpu) == ("cuda", (settings, torch.device("cuda", 1)), ("cpu", set()))
    assert {"F32", "BF16"} <= dtypes
