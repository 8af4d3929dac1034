"""A second GPU that is none: tensors on ``cuda:1`` whose numbers lie in host memory, and kernels that are functions of
these. What a GPU refuses is refused: tensors of two devices in one operation, and kernels over tensors of the host, of
another than the current device, or with gaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 1)
"""Not the one that a process begins with."""

_WITHIN = torch.device("meta")
"""What torch's own code takes for it: at the name of CUDA it would start that, or note for good that it had."""

_CROSSING = ("_to_copy", "copy_")
"""Operations that take tensors of two devices."""

_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that bring indices to the device themselves."""


class OnGpu(torch.Tensor):
    """A tensor that lies on ``GPU``, as far as Python can tell; ``held`` has its numbers. Torch's own code takes it for
    one of the host."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def cpu(self, *_: Any) -> torch.Tensor:
        return self.held.clone()

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"{func} outside of standin_gpu()")


class _Names(TorchFunctionMode):
    """Says ``_WITHIN`` for ``GPU``, and refuses other GPUs."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if isinstance(options.get("device"), str):
            options["device"] = torch.device(options["device"])
        args, options = tree_map_only(torch.device, _within, (tuple(args), options))
        if func is torch.Tensor.to and isinstance(args[0], OnGpu) and _names_cpu(*args[1:], *options.values()):
            args = (args[0].cpu(), *args[1:])
        return func(*args, **options)


def _within(device: torch.device) -> torch.device:
    assert device.type != "cuda" or device == GPU, f"{device} is not {GPU}"
    return _WITHIN if device.type == "cuda" else device


def _names_cpu(*arguments: Any) -> bool:
    return any(str(named) == "cpu" for named in arguments if isinstance(named, (str, torch.device)))


class _Devices(TorchDispatchMode):
    """Computes on the host, and keeps count of what lies where."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options, name = dict(kwargs or {}), func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        if there and name not in _CROSSING:
            beside = tensors[:1] if name in _INDEXED else tensors
            strays = [list(t.shape) for t in beside if not isinstance(t, OnGpu) and t.dim()]
            assert not strays, f"{name} of tensors on {GPU} and, of shapes {strays}, on the CPU"
        on_gpu = isinstance(args[0], OnGpu) if name == "copy_" else bool(there)
        if (target := options.get("device")) is not None:
            on_gpu = target == _WITHIN
            options["device"] = "cpu"
        owners = {id(tensor.held): tensor for tensor in there}
        found = func(*tree_map_only(OnGpu, _held, args), **tree_map_only(OnGpu, _held, options))

        def lent(made: torch.Tensor) -> OnGpu:
            """Itself where it was written in place; of a tensor of the host's a copy, as a GPU has."""
            owner = owners.get(id(made))
            return owner if owner is not None else OnGpu(made.clone() if any(made is t for t in tensors) else made)

        return tree_map_only(torch.Tensor, lent, found) if on_gpu else found


def _held(tensor: OnGpu) -> torch.Tensor:
    return tensor.held


class StandIn:
    """The device, whose kernels are replaced.

    Attributes:
        launched: names of kernels, in the order of their launches.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launched: list[str] = []
        self._patch = patch
        self._current = [torch.device("cuda", 0)]

    @contextmanager
    def device(self, chosen: torch.device) -> Iterator[None]:
        """For ``torch.cuda.device``."""
        self._current.append(chosen)
        yield
        self._current.pop()

    def replace(self, module: ModuleType, name: str, kernel: Callable[..., object]) -> None:
        """``module``'s kernel is ``kernel``, of its grid and its arguments, which are then tensors of the host."""

        def launch(grid: Sequence[int], *args: Any, **options: Any) -> None:
            for place, tensor in enumerate(args):
                if isinstance(tensor, torch.Tensor):
                    assert isinstance(tensor, OnGpu), f"{name}: argument {place} lies on the CPU"
                    assert tensor.is_contiguous(), f"{name}: argument {place} has gaps"
            assert self._current[-1] == GPU, f"{name} is launched on {self._current[-1]}"
            self.launched.append(name)
            with _disable_current_modes():
                kernel(grid, *tree_map_only(OnGpu, _held, args), **options)

        self._patch.setattr(module, name, _Kernel(launch))


class _Kernel:
    """``kernel[grid](*arguments)`` as ``launch(grid, *arguments)``."""

    def __init__(self, launch: Callable[..., None]) -> None:
        self._launch = launch

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return lambda *args, **options: self._launch(grid, *args, **options)


@contextmanager
def standin_gpu() -> Iterator[StandIn]:
    """``GPU`` for as long as it lasts; an H200's numbers where one asks for its properties."""
    with pytest.MonkeyPatch.context() as patch:
        gpu = StandIn(patch)
        h200 = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 << 10)
        patch.setattr(torch.cuda, "device", gpu.device)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda _: h200)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        with _Devices(), _Names():
            yield gpu
