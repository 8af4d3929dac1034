"""What a quantization reads, makes and writes: as data, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.json_file import json_bytes
from weightkit.checkpoint.tensors import LazyTensor, Promised, size_bytes, stored_parts
from weightkit.errors import PlanError, UnsupportedError
from weightkit.family import QUANTIZE_CONFIG_NAME, Architecture, Expected, blueprint, gptq_config, is_mtp, layer_of
from weightkit.layouts.declare import architecture_of
from weightkit.layouts.fileset import file_set
from weightkit.layouts.published import shard_names
from weightkit.quantization.packed import PARTS
from weightkit.quantization.settings import Settings
from weightkit.transforms import cast, strip_mtp
from weightkit.writer import Plan, PlannedFile, make_plan

#: Changes when the same settings begin to give other bytes: what was begun with another is not continued.
ALGORITHM = 1


@dataclass(frozen=True)
class QuantizationPlan:
    """A quantization of one checkpoint into one folder.

    Attributes:
        settings: what was asked for.
        arch: of the source.
        source_bytes: of its tensors.
        exact: the source in F32, which the integers are made from.
        plain: the source in BF16, which is computed with and stored where nothing is quantized.
        shapes: published name to shape [N, K] of the weights that become integers.
        write: the plan of the output. What is made on the way is ``Promised`` in it.
    """

    settings: Settings
    arch: Architecture
    source_bytes: int
    exact: Checkpoint
    plain: Checkpoint
    shapes: Mapping[str, tuple[int, int]]
    write: Plan
    _file_of: Mapping[int | None, str]

    def file_of(self, layer: int) -> PlannedFile:
        """The file that a layer is written to."""
        return next(file for file in self.write.files if file.name == self._file_of[layer])

    def shapes_in(self, layer: int) -> dict[str, tuple[int, int]]:
        """Those of ``shapes`` in one layer."""
        prefix = f"model.layers.{layer}."
        return {name: shape for name, shape in self.shapes.items() if name.startswith(prefix)}

    @property
    def plain_files(self) -> list[PlannedFile]:
        """Files in which nothing is quantized."""
        return [file for file in self.write.files if not any(_is_promised(t) for t in file.tensors.values())]

    @property
    def quantized_source_bytes(self) -> int:
        """Bytes of the source that integers are made from."""
        return sum(size_bytes(part) for name in self.shapes for part in stored_parts(self.exact[name]))

    @property
    def largest_layer_bytes(self) -> int:
        """Bytes made for the layer with most."""
        return max(map(_promised_bytes, self.write.files))


def plan_quantization(
    checkpoint: Checkpoint, target: Path, settings: Settings, *, calibration: str, version: str
) -> QuantizationPlan:
    """Plan to quantize ``checkpoint`` into ``target``. Reads nothing but side files.

    Args:
        checkpoint: FP8 or BF16, in any layout.
        calibration: the digest of the calibration tokens; of nothing for rounding to nearest.
        version: of this package, for the output's ``meta``.

    Raises:
        UnsupportedError: a source that is quantized to integers already.
        PlanError: settings that do not fit the weights.
        ConfigError, CheckpointError: as ``cast``.
    """
    arch = architecture_of(checkpoint)
    if arch.quantization is not None and not arch.quantization.is_fp8:
        raise UnsupportedError(
            "quantized already",
            where=f"{checkpoint.root}: quantization_config",
            expected="FP8, BF16, F16 or F32 weights",
            found=arch.quantization.method,
            fix="Quantize the FP8 or BF16 repository of this model.",
        )
    source_bytes = checkpoint.size_bytes
    if not settings.mtp:
        checkpoint = strip_mtp(checkpoint)
    plain, exact = cast(checkpoint, "bf16"), cast(checkpoint, "f32")
    config = gptq_config(
        arch,
        bits=settings.bits,
        group_size=settings.group_size,
        scope=settings.scope,  # type: ignore[arg-type]
        mtp=any(is_mtp(name, arch) for name in plain.tensors),
        meta=_meta(settings, calibration, version),
    )
    plain = replace(plain, config={**plain.config, "quantization_config": config}, placement={})
    expected = blueprint(Architecture.from_config(plain.config, where="the quantized config"))
    recipe = json.dumps(["gptq", ALGORITHM, settings.to_json(), calibration], sort_keys=True)
    shapes, tensors = _outputs(plain.tensors, expected, recipe)
    if not shapes:
        raise PlanError("there is nothing to quantize", where="--scope", found=settings.scope, fix="Use --scope all.")
    output = replace(plain, tensors=tensors)
    grouped = _by_layer(tensors)
    names = dict(zip(grouped, shard_names(len(grouped)), strict=True))
    files = {names[layer]: group for layer, group in grouped.items()}
    extra = {QUANTIZE_CONFIG_NAME: json_bytes(config)}
    write = make_plan(file_set(output, files, index=True, extra=extra), target)
    return QuantizationPlan(settings, arch, source_bytes, exact, plain, shapes, write, names)


def _meta(settings: Settings, calibration: str, version: str) -> dict[str, object]:
    """What the output says of how it was made; engines do not read it."""
    kept = {key: value for key, value in settings.to_json().items() if key not in ("bits", "group_size", "mtp")}
    return {"quantizer": [f"weightkit:{version}"], **kept, "calibration_sha256": calibration}


def _outputs(
    plain: Mapping[str, LazyTensor], expected: Mapping[str, Expected], recipe: str
) -> tuple[dict[str, tuple[int, int]], dict[str, LazyTensor]]:
    """Shapes of the weights that become integers; and all tensors of the output, in the model's order."""
    shapes: dict[str, tuple[int, int]] = {}
    tensors: dict[str, LazyTensor] = {}
    for name, item in expected.items():
        module, _, part = name.rpartition(".")
        weight = f"{module}.weight"
        if name in plain:
            tensors[name] = plain[name]
        elif part in PARTS and weight in plain:
            rows, columns = plain[weight].shape
            shapes[weight] = (rows, columns)
            tensors[name] = Promised(recipe, item.dtype, item.shape)
    others = {name: tensor for name, tensor in plain.items() if name not in shapes and name not in tensors}
    return shapes, tensors | others


def _by_layer(tensors: Mapping[str, LazyTensor]) -> dict[int | None, dict[str, LazyTensor]]:
    """What is outside the layers first, then each layer."""
    grouped: dict[int | None, dict[str, LazyTensor]] = {None: {}}
    for name, tensor in tensors.items():
        grouped.setdefault(layer_of(name), {})[name] = tensor
    return {layer: grouped[layer] for layer in _in_order(grouped)}


def _in_order(grouped: Mapping[int | None, object]) -> Iterator[int | None]:
    if grouped[None]:
        yield None
    yield from sorted(layer for layer in grouped if layer is not None)


def _is_promised(tensor: LazyTensor) -> bool:
    return isinstance(tensor, Promised)


def _promised_bytes(file: PlannedFile) -> int:
    return sum(size_bytes(tensor) for tensor in file.tensors.values() if _is_promised(tensor))
