"""The JSON files beside the weights, which must parse, and ``quantize_config.json`` against the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from weightkit.checkpoint.folder import CONFIG_NAME
from weightkit.checkpoint.json_file import read_json_object
from weightkit.errors import ConfigError, FormatError, WeightkitError
from weightkit.examine.survey import attempt
from weightkit.family import QUANTIZE_CONFIG_NAME, Quantization, read_gptq
from weightkit.layouts.ranks import DEMO_CONFIG_NAME

GENERATION_NAME = "generation_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
JSON_NAMES = (
    GENERATION_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    DEMO_CONFIG_NAME,
    QUANTIZE_CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
TOKENIZER_NAMES = (TOKENIZER_NAME, "tokenizer.model", "tiktoken.model", "vocab.json")
TEMPLATE_NAME = "chat_template.jinja"
_ONE_DICTIONARY = "Write quantization_config of config.json into it, once that is right: engines read either."
_COMPARED = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "rules", "modules_in_block")


def read_sides(
    folder: Path, config: Mapping[str, object] | None
) -> tuple[dict[str, Mapping[str, object]], list[WeightkitError]]:
    """The folder's JSON files by name, and the problems of those that cannot be read.

    Args:
        config: the folder's own config, where it could be read.
    """
    problems: list[WeightkitError] = []
    contents: dict[str, Mapping[str, object]] = {} if config is None else {CONFIG_NAME: config}
    for name in JSON_NAMES:
        path = folder / name
        if path.exists():
            value = _read_json(path)
            if isinstance(value, WeightkitError):
                problems.append(value)
            else:
                contents[name] = value
    return contents, problems


def quantize_config_problems(
    folder: Path, contents: Mapping[str, Mapping[str, object]]
) -> tuple[list[WeightkitError], list[str]]:
    """``quantize_config.json`` held against the config: defects, and what is odd without being one."""
    side, config = contents.get(QUANTIZE_CONFIG_NAME), contents.get(CONFIG_NAME)
    if side is None or config is None:
        return [], []
    declared = config.get("quantization_config")
    if isinstance(declared, Mapping) and declared.get("quant_method") == "gptq":
        return list(_gptq_problems(folder / QUANTIZE_CONFIG_NAME, side, declared)), []
    return [], [f"{QUANTIZE_CONFIG_NAME}, and config.json declares no GPTQ"]


def _gptq_problems(path: Path, side: Mapping[str, object], declared: Mapping[str, object]) -> Iterator[WeightkitError]:
    """``quantize_config.json`` held against ``quantization_config``: what both say of the tensors must agree."""
    broken: list[str] = []
    found = attempt(lambda: read_gptq(side, broken, where=str(path)), path)
    wanted = attempt(lambda: read_gptq(declared, [], where=CONFIG_NAME), CONFIG_NAME)
    if isinstance(found, WeightkitError):
        yield found
    elif broken:
        yield ConfigError("not a description of GPTQ", where=path, found="; ".join(broken), fix=_ONE_DICTIONARY)
    elif isinstance(found, Quantization) and isinstance(wanted, Quantization) and found != wanted:
        keys = [key for key in _COMPARED if getattr(found, key) != getattr(wanted, key)]
        yield ConfigError(
            "not what quantization_config in config.json says",
            where=path,
            expected=", ".join(f"{key} {getattr(wanted, key)}" for key in keys),
            found=", ".join(f"{key} {getattr(found, key)}" for key in keys),
            fix=_ONE_DICTIONARY,
        )


def _read_json(path: Path) -> Mapping[str, object] | WeightkitError:
    if not path.is_file():
        return FormatError("not a file", where=path)
    return attempt(lambda: read_json_object(path), path)
