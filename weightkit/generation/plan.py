"""What a generation will read and how long that takes, said before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from weightkit.checkpoint.direct import ReadRate
from weightkit.family import Architecture
from weightkit.generation.memory import Budget
from weightkit.model.checkpoint_weights import WeightSizes
from weightkit.units import counted, human_bytes, human_seconds


@dataclass(frozen=True)
class GenerationPlan:
    """The cost of a generation in reading; computing comes on top where it is slower.

    Attributes:
        weights_bytes: of all weights that are needed, as they are stored.
        dense_bytes: of the same in the compute dtype.
        dtype, device: in which and on what is computed.
        is_streamed: whether not all of them fit, so that files are read again.
        budget: how memory is divided.
        prompts, prompt_tokens: how many, and their tokens together.
        passes: groups of prompts that go through one after the other; within one each layer is read once for all.
        prompt_bytes: about what the prompts' passes read from files, if experts are chosen evenly.
        token_bytes: about what one new token of every prompt of a pass needs.
        token_read_bytes: the part of it that no cache has, and that is read from files.
        rate: how fast the files are read; None where it was not measured.
        multiplies_stored: whether quantized weights are multiplied with as they are stored, on a GPU.
    """

    weights_bytes: int
    dense_bytes: int
    dtype: str
    device: str
    is_streamed: bool
    budget: Budget
    prompts: int
    prompt_tokens: int
    passes: int
    prompt_bytes: int
    token_bytes: int
    token_read_bytes: int
    rate: ReadRate | None = None
    multiplies_stored: bool = False

    @property
    def prompt_s(self) -> float | None:
        """Seconds to read what the prompts' passes need."""
        return None if self.rate is None else self.prompt_bytes / self.rate.bytes_per_s

    @property
    def token_s(self) -> float | None:
        """Seconds to read what one new token needs."""
        return None if self.rate is None else self.token_read_bytes / self.rate.bytes_per_s

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return asdict(self) | {"prompt_s": self.prompt_s, "token_s": self.token_s}

    def render(self) -> str:
        """A few lines for a terminal."""
        kept = "as stored, and multiplied with so;" if self.multiplies_stored else "as stored,"
        dense = f"{human_bytes(self.weights_bytes)} {kept} {human_bytes(self.dense_bytes)} in {self.dtype}"
        prompts = f"{counted(self.prompts, 'prompt')}, {counted(self.prompt_tokens, 'token')}"
        together = "" if self.passes == 1 else f", in {self.passes} passes"
        saved = self.token_bytes - self.token_read_bytes
        cached = f", about {human_bytes(saved)} of it from the cache" if saved else ""
        lines = [
            f"Weights     {dense}",
            f"Memory      {self._room()}",
            f"Prompt      {prompts}{together}: about {human_bytes(self.prompt_bytes)} to read{_taking(self.prompt_s)}",
            f"New token   about {human_bytes(self.token_bytes)}{cached}{_taking(self.token_s)}",
        ]
        if self.rate is not None:
            how = "past the page cache" if self.rate.direct else "through the page cache, which was told to forget"
            lines.append(f"Disk        {human_bytes(self.rate.bytes_per_s)}/s measured, {how}")
        return "\n".join(lines)

    def _room(self) -> str:
        """What there is for weights, and whether it is enough."""
        budget, where = self.budget, "of the GPU" if self.device == "cuda" else "of host memory"
        room = f"{human_bytes(budget.device_weights)} {where}"
        if budget.host_weights:
            room += f" and {human_bytes(budget.host_weights)} of host memory"
        room += f" for them, beside {human_bytes(budget.working)} to work in"
        if not self.is_streamed:
            return f"{room}: they fit"
        if self.weights_bytes <= budget.device_weights:
            return f"{room}: they fit, and are read when they are needed first"
        if self.weights_bytes <= budget.device_weights + budget.host_weights:
            return f"{room}: they fit in both together"
        return f"{room}: they do not fit, and are read again as they are needed"


def estimate(
    arch: Architecture,
    sizes: WeightSizes,
    budget: Budget,
    waves: Sequence[Sequence[int]],
    *,
    dtype: str,
    device: str,
    is_streamed: bool,
    rate: ReadRate | None = None,
    multiplies_stored: bool = False,
) -> GenerationPlan:
    """The plan for prompts of these lengths, in the groups in which they go through.

    Which experts tokens choose is not known beforehand: they are counted as if each token chose evenly and for itself.
    """
    room = budget.device_weights + budget.host_weights
    kept_always = min(room, sizes.always)
    kept_share = min(1.0, (room - kept_always) / sizes.experts) if sizes.experts else 1.0
    width = max(map(len, waves))
    token_experts = expected_expert_bytes(arch, sizes, width)
    # what a pass leaves in the caches is there for the next one, as it is for the next token
    again = sizes.always - kept_always
    prompt_bytes = 0
    for number, lengths in enumerate(waves):
        experts, rows = expected_expert_bytes(arch, sizes, sum(lengths)), sum(lengths) * sizes.row
        prompt_bytes += rows + (sizes.always + experts if number == 0 else again + int(experts * (1 - kept_share)))
    return GenerationPlan(
        weights_bytes=sizes.total,
        dense_bytes=sizes.dense,
        dtype=dtype,
        device=device,
        is_streamed=is_streamed,
        budget=budget,
        prompts=sum(map(len, waves)),
        prompt_tokens=sum(map(sum, waves)),
        passes=len(waves),
        prompt_bytes=prompt_bytes,
        token_bytes=sizes.always + token_experts + width * sizes.row,
        token_read_bytes=again + int(token_experts * (1 - kept_share)) + width * sizes.row,
        rate=rate,
        multiplies_stored=multiplies_stored,
    )


def expected_expert_bytes(arch: Architecture, sizes: WeightSizes, tokens: int) -> int:
    """Bytes of the routed experts that so many tokens choose in all layers, if each chooses evenly and for itself."""
    if not sizes.experts:
        return 0
    untouched = (1 - arch.num_experts_per_tok / arch.n_routed_experts) ** tokens
    return int(sizes.experts * (1 - untouched))


def _taking(seconds: float | None) -> str:
    return "" if seconds is None else f", {human_seconds(seconds)}"
