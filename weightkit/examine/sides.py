"""The small files beside the weights: code that the config names, tokenizer, JSON that must parse."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from weightkit.checkpoint.folder import CONFIG_NAME
from weightkit.checkpoint.json_file import read_json_object, strings
from weightkit.errors import ConfigError, FormatError, MissingFileError, WeightkitError
from weightkit.examine.survey import attempt
from weightkit.family import QUANTIZE_CONFIG_NAME, Quantization, read_gptq
from weightkit.layouts.ranks import DEMO_CONFIG_NAME

JSON_NAMES = (
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    DEMO_CONFIG_NAME,
    QUANTIZE_CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")
TEMPLATE_NAME = "chat_template.jinja"
_ONE_DICTIONARY = "Write quantization_config of config.json into it, once that is right: engines read either."
_COMPARED = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "rules", "modules_in_block")
MAX_CODE_BYTES = 16 << 20
_RELATIVE_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import", re.MULTILINE)


def side_problems(folder: Path, config: Mapping[str, object] | None) -> tuple[list[WeightkitError], list[str]]:
    """Defects, and what is missing without being one.

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
    problems += _code_problems(folder, contents)
    gptq = contents.pop(QUANTIZE_CONFIG_NAME, None)
    notes = list(_notes(folder, contents.get("tokenizer_config.json", {})))
    if gptq is not None and config is not None:
        declared = config.get("quantization_config")
        if isinstance(declared, Mapping) and declared.get("quant_method") == "gptq":
            problems += _gptq_problems(folder / QUANTIZE_CONFIG_NAME, gptq, declared)
        else:
            notes.append(f"{QUANTIZE_CONFIG_NAME}, and config.json declares no GPTQ")
    return problems, notes


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


def _notes(folder: Path, tokenizer_config: Mapping[str, object]) -> Iterator[str]:
    if not any((folder / name).is_file() for name in TOKENIZER_NAMES):
        yield f"no tokenizer ({', '.join(TOKENIZER_NAMES)}): weights alone generate no text"
    elif "chat_template" not in tokenizer_config and not (folder / TEMPLATE_NAME).is_file():
        yield f"no chat template, neither in tokenizer_config.json nor as {TEMPLATE_NAME}"


def _code_problems(folder: Path, contents: Mapping[str, Mapping[str, object]]) -> Iterator[WeightkitError]:
    """Each module that an ``auto_map`` names, and each that those modules import from beside them."""
    named = {module: name for name, content in contents.items() for module in _modules(content.get("auto_map"))}
    waiting = list(named)
    while waiting:
        module = waiting.pop()
        path = folder / f"{module}.py"
        if not path.is_file():
            yield MissingFileError(
                "a code file that is named is not there",
                where=path,
                expected=f"there, as {named[module]} names it",
                found="no such file",
                fix="Fetch it from the published repository: without it the checkpoint does not load there.",
            )
            continue
        for imported in _imports(path):
            if imported not in named:
                named[imported] = path.name
                waiting.append(imported)


def _modules(auto_map: object) -> Iterator[str]:
    """``modeling_deepseek`` of ``modeling_deepseek.DeepseekV3ForCausalLM``; code in other repositories (``owner/name--
    module.Class``) is not looked for."""
    for target in strings(auto_map):
        module, dot, _ = target.partition(".")
        if dot and module.isidentifier():
            yield module


def _imports(path: Path) -> list[str]:
    with path.open("rb") as file:
        text = file.read(MAX_CODE_BYTES).decode("utf-8", "replace")
    return sorted(set(_RELATIVE_IMPORT.findall(text)))
