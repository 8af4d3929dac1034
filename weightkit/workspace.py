"""Where checkpoints lie when no path is given: ``WEIGHTKIT_HOME`` or ``./weights``, a folder a model, a folder a form.

weights/deepseek-v3/fp8             as published
weights/deepseek-v3/fp8-no-mtp      strip
weights/deepseek-v3/bf16            cast --to bf16
weights/deepseek-v3/mp8             shard --mp 8
weights/deepseek-v3/bf16-mp16       shard --mp 16 --to bf16
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from weightkit import manifests
from weightkit.errors import NotACheckpointError
from weightkit.remote.address import address_of, title_of

DEFAULT_MODEL = "deepseek-v3"


def home() -> Path:
    """The workspace."""
    return Path(os.environ.get("WEIGHTKIT_HOME") or "weights")


def model_folder(model: str) -> Path:
    """A model's folder in the workspace. Raises ``PlanError`` for a model without a manifest."""
    return home() / manifests.load(model).name


def published_form(model: str) -> str:
    """The name of the form that the hubs publish: ``fp8`` or ``bf16``."""
    quantization = manifests.load(model).config.get("quantization_config")
    return "fp8" if isinstance(quantization, dict) and quantization.get("quant_method") == "fp8" else "bf16"


def published(model: str) -> Path:
    """The model as published: in the workspace, or, for one that ships with the package, there."""
    folder = model_folder(model) / published_form(model)
    shipped = manifests.load(model).path
    return shipped if shipped is not None and not folder.exists() else folder


def source(model: str) -> Path:
    """The source of a command without arguments. Raises ``NotACheckpointError`` where there is none yet."""
    path = published(model)
    if not path.exists():
        raise NotACheckpointError(
            f"{model} is not in the workspace",
            where=path,
            fix=f"Run `weightkit fetch {model}`, name a folder as SRC, or use --model pico, which ships here.",
        )
    return path


def sharded_source(model: str) -> Path:
    """The rank files that ``merge`` reads without arguments: the only ones of the model in the workspace."""
    folder = model_folder(model)
    found = sorted(path.parent for path in folder.glob("*/model0-*.safetensors")) if folder.is_dir() else []
    if len(found) == 1:
        return found[0]
    raise NotACheckpointError(
        "several folders of rank files" if found else "no rank files in the workspace",
        where=folder,
        found=", ".join(path.name for path in found) or None,
        fix="Name the folder as SRC." if found else "Write some with `weightkit shard`, or name their folder as SRC.",
    )


def target(model: str, src: Path | None, form: Sequence[str]) -> Path:
    """Where a result goes that is named by no one: ``form`` in the workspace, or beside an explicit source's folder; of
    one at an address, in the current folder."""
    name = "-".join(form)
    if src is None:
        return model_folder(model) / name
    if address_of(src) is not None:
        return Path(f"{title_of(src.parent if src.suffix == '.safetensors' else src)}-{name}")
    folder = src.parent if src.is_file() else src
    folder = folder.resolve() if folder.name == ".." else folder.absolute()
    return folder.with_name(f"{folder.name}-{name}")
