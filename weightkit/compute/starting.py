"""A GPU that starts behind the work: the CPU computes until it is ready, which changes no bit.

Importing torch, opening CUDA and loading the kernels take seconds, in which a CPU casts some gigabytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from weightkit.checkpoint.tensors import (
    BlockQuantized,
    Dequantized,
    GroupDequantized,
    LazyTensor,
    made_from,
    size_bytes,
)
from weightkit.compute.engines import (
    UNUSABLE,
    CpuEngine,
    CudaEngine,
    DeviceName,
    Engine,
    EngineSupply,
    choose_engine,
    has_driver,
    no_device,
    reason,
)
from weightkit.compute.evaluate import strips
from weightkit.compute.trial import Trial
from weightkit.errors import DeviceError

#: ``auto`` starts no GPU for less: one takes 4 to 5 s to start (torch, CUDA, kernels; measured beside an H200), in
#: which 16 cores cast 20 GB, and a process ends no sooner than the GPU that it starts.
WORTH_BYTES = 32 << 30
#: Variables that say which GPUs a process sees, by number, UUID or name of an instance; of AMD's, the last ones.
_CHOOSERS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
#: What the kernels are loaded with: strips as the writer's.
SAMPLE_BYTES = 8 << 20


class StartingEngine:
    """The CPU at once, and from when it is ready on what ``open_gpu`` returns. See ``EngineSupply``.

    Args:
        open_gpu: run in a thread of its own, with what says something to the user. None where there is no GPU.
        required: whether ``now`` raises its failure; otherwise that is told, and the CPU goes on.
    """

    def __init__(self, open_gpu: Callable[[Callable[[str], None]], Engine | None], *, required: bool) -> None:
        self._cpu: Engine = CpuEngine()
        self._open, self._required = open_gpu, required
        self._gpu: Engine | None = None
        self._failure: BaseException | None = None
        self._tell: Callable[[str], None] | None = None
        self._untold: list[str] = []
        self._telling = threading.Lock()
        # Python waits for it at its exit: a thread that is cut off within CUDA or LLVM takes the process down
        self._thread = threading.Thread(target=self._run, name="weightkit-gpu-start")
        self._thread.start()

    def now(self) -> Engine:
        gpu = self._gpu
        if gpu is not None:
            return gpu
        if self._failure is not None and self._required:
            found = reason(self._failure)
            raise DeviceError(UNUSABLE, where="--device", found=found, fix="Use --device cpu.") from self._failure
        return self._cpu

    def fail(self, failure: DeviceError) -> bool:
        """The GPU failed at its work. Returns whether the CPU goes on from now, which is told; not where the GPU is
        required."""
        if self._required:
            return False
        with self._telling:
            first, self._gpu, self._failure = self._gpu is not None, None, failure
        if first:
            self._say(f"The GPU is given up ({reason(failure)}). The CPU goes on; the bytes are the same.")
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the GPU is ready, or has failed."""
        self._thread.join(timeout_s)

    def tell(self, tell: Callable[[str], None]) -> None:
        """Where to say, once, that a GPU failed and what goes on without it."""
        with self._telling:
            self._tell = tell
        self._say()

    def _run(self) -> None:
        try:
            self._gpu = self._open(self._say)
        except _Unwanted:
            return
        except BaseException as exc:  # a driver, torch or Triton may fail in any way
            self._failure = exc
            if not self._required:
                self._say(f"The GPU cannot be used ({reason(exc)}). The CPU computes; the bytes are the same.")

    def _say(self, *messages: str) -> None:
        with self._telling:
            self._untold += messages
            if self._tell is None:
                return
            told, self._untold, tell = self._untold, [], self._tell
        for message in told:
            tell(message)


def start_engine(
    device: DeviceName = "auto", work: Iterable[LazyTensor] | None = None, *, worth_bytes: int = WORTH_BYTES
) -> EngineSupply:
    """The engine for ``--device``, at work at once: on the CPU until the GPUs, all that CUDA shows, are ready.

    Args:
        device: ``auto`` takes GPUs where there are some and ``work`` is worth their start.
        work: the tensors that are to be computed, whose kernels are made ready; None where they are not known.
        worth_bytes: what ``auto`` starts none below; for who sees a part of the work, less.

    Raises ``DeviceError``: ``cuda``, and there is no GPU, as far as can be told without torch.
    """
    tensors = [tensor for tensor in work or () if has_kernel(tensor)]
    small = work is not None and sum(map(size_bytes, tensors)) < max(1, worth_bytes)
    if device == "cpu" or (device == "auto" and (small or not has_driver())):
        return CpuEngine()
    samples = _samples(tensors)
    if device == "auto":
        return StartingEngine(partial(_open_any, samples), required=False)
    count = count_gpus()
    if count == 0:
        raise no_device(_what_cuda_says())
    if count is not None and _torch_lacks_cuda():
        raise no_device("no torch that was built with CUDA")
    if count is None:  # an AMD GPU, or none: only torch knows
        choose_engine(device)
    return StartingEngine(partial(_open, samples), required=True)


def open_engine(device: DeviceName = "auto", work: Iterable[LazyTensor] = ()) -> Engine:
    """The engine for ``--device``, ready: ``auto`` takes a GPU where there is one, the current one of several, which
    then has computed the first strip of each kind of ``work`` as the CPU does, kernels loaded.

    For who must know which it is, since other things follow from it than where the same bits are made.

    Raises ``DeviceError``: no GPU where one was asked for; one that fails, or gives other bits.
    """
    engine = choose_engine(device)
    if isinstance(engine, CudaEngine):
        import torch

        trial = Trial(_samples(filter(has_kernel, work)))
        trial.require(CudaEngine(engine.devices), f"cuda:{engine.devices[0]}")
        torch.cuda.empty_cache()  # of the trial: others measure what is free
    return engine


def count_gpus() -> int | None:
    """GPUs that CUDA shows to this process, from the driver itself; None where there is none of NVIDIA's to ask."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _what_cuda_says() -> str:
    """Why CUDA shows no GPU: its name for the error, and what may hide them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    hiding = "" if chosen is None else f" with CUDA_VISIBLE_DEVICES={chosen}"
    return f"{_error_of_driver() or 'no device'}{hiding}"


def _error_of_driver() -> str | None:
    with suppress(OSError, AttributeError):  # no driver, or an old one
        driver, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_char_p()
        code = driver.cuInit(0)
        if code and driver.cuGetErrorName(code, ctypes.byref(name)) == 0 and name.value:
            return f"{name.value.decode()} from cuInit"
        if code:
            return f"error {code} from cuInit"
    return None


def _torch_lacks_cuda() -> bool:
    """Whether torch is a build without CUDA, as its version file says, which is read, not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*= None\b", text, re.MULTILINE) is not None


class _Unwanted(Exception):  # noqa: N818 - it ends a thread
    pass


def _require_wanted() -> None:
    """End the thread where the process is about to exit."""
    if not threading.main_thread().is_alive():
        raise _Unwanted


def _open_any(samples: Sequence[LazyTensor], say: Callable[[str], None]) -> Engine | None:
    """As ``_open``; None where CUDA shows no GPU, or where there is none of NVIDIA's and torch sees no other."""
    count = count_gpus()
    if count is None:
        import torch

        count = torch.cuda.device_count()
    return _open(samples, say) if count else None


def _open(samples: Sequence[LazyTensor], say: Callable[[str], None]) -> Engine:
    """All GPUs that compute the samples as the CPU does, kernels loaded. Raises ``DeviceError`` where none does."""
    import torch

    _require_wanted()
    if not torch.cuda.is_available():
        found = f"torch {torch.__version__}"
        raise DeviceError("torch cannot use the GPU", where="--device", found=found, fix="Use --device cpu.")
    trial = Trial(samples, _require_wanted)
    working, failures = list[int](), dict[int, DeviceError]()
    count = count_gpus()  # torch, which asks NVML, counts whole GPUs that are cut into instances (MIG)
    for number in range(torch.cuda.device_count() if count is None else count):
        try:
            trial.require(CudaEngine([number]), f"cuda:{number}")
            working.append(number)
        except DeviceError as exc:
            failures[number] = exc
    if not working:
        raise next(iter(failures.values()))
    for number, failure in failures.items():
        name, why = _shown_name(number), reason(failure)
        say(f"GPU {name} cannot be used ({why}). The others compute; the bytes are the same.")
    return CudaEngine(working)


def shown_names() -> list[str]:
    """What whoever chose the GPUs that this process sees calls them, in their order; empty where nobody chose."""
    chosen = [os.environ[name] for name in _CHOOSERS if os.environ.get(name)]
    return [name.strip() for name in chosen[0].split(",")] if chosen else []


def _shown_name(number: int) -> str:
    return dict(enumerate(shown_names())).get(number, str(number))


def _samples(tensors: Iterable[LazyTensor]) -> list[LazyTensor]:
    """The first strip of a tensor of each kind."""
    first: dict[object, LazyTensor] = {}
    for tensor in tensors:
        first.setdefault(_kind(tensor), tensor)
    return [next(strips(tensor, SAMPLE_BYTES)) for tensor in first.values()]


def _kind(tensor: LazyTensor) -> object:
    """What computing it takes: its class, its dtype, and the same of what it is made from. One kernel makes codes and
    their scales."""
    made = tensor.power_of_two if isinstance(tensor, BlockQuantized) else tensor.dtype
    within = () if isinstance(tensor, Dequantized | GroupDequantized) else made_from(tensor)
    return type(tensor).__name__, made, *map(_kind, within)


def has_kernel(tensor: LazyTensor) -> bool:
    """Whether a GPU computes some of it; plain casts and gathers are the CPU's everywhere."""
    if isinstance(tensor, Dequantized | GroupDequantized | BlockQuantized):
        return True
    return any(map(has_kernel, made_from(tensor)))
