"""Python code beside the weights: what an ``auto_map`` names must be there and parse. It is read, never run."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from weightkit.checkpoint.json_file import strings
from weightkit.errors import ConfigError, FormatError, MissingFileError, WeightkitError
from weightkit.examine.survey import attempt

#: The published files have 80 KB; a tree of much more would take much memory.
MAX_CODE_BYTES = 1 << 20
_FETCH = "Fetch it from the published repository: without it the checkpoint does not load there."


def code_problems(folder: Path, contents: Mapping[str, Mapping[str, object]]) -> Iterator[WeightkitError]:
    """Each module that an ``auto_map`` names, with its classes, and each that those modules import from beside them.

    Args:
        contents: the folder's JSON files that could be read, by name.
    """
    named: dict[str, str] = {}
    classes: dict[str, list[str]] = {}
    for file, content in contents.items():
        for target in strings(content.get("auto_map")):
            module, _, name = target.partition(".")
            if "--" in target or "/" in module:
                continue  # code of another repository (owner/name--module.Class) or folder is not looked for
            if not (module.isidentifier() and name.isidentifier()):
                yield _no_target(target, folder / file)
                continue
            named.setdefault(module, file)
            classes.setdefault(module, []).append(name)
    waiting = list(named)
    while waiting:
        module = waiting.pop()
        path = folder / f"{module}.py"
        tree = _parsed(path, named[module])
        if isinstance(tree, WeightkitError):
            yield tree
            continue
        yield from _class_problems(tree, classes.get(module, []), path, named[module])
        for imported in sorted(_imports(tree) - named.keys()):
            named[imported] = path.name
            waiting.append(imported)


def _no_target(target: str, where: Path) -> ConfigError:
    return ConfigError(
        "auto_map does not name a class of a module",
        where=where,
        expected="module.Class",
        found=target[:80],
        fix=f"Take {where.name} from the published repository.",
    )


def _parsed(path: Path, named_by: str) -> ast.Module | WeightkitError:
    if not path.is_file():
        return MissingFileError(
            "a code file that is named is not there",
            where=path,
            expected=f"there, as {named_by} names it",
            found="no such file",
            fix=_FETCH,
        )
    return attempt(lambda: _parse(path), path)


def _parse(path: Path) -> ast.Module:
    """The syntax tree of a file. Raises ``FormatError``."""
    with path.open("rb") as file:
        source = file.read(MAX_CODE_BYTES + 1)
    if len(source) > MAX_CODE_BYTES:
        raise FormatError(
            "too large for a code file of a checkpoint", where=path, expected=f"at most {MAX_CODE_BYTES:,} bytes"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that some day will be errors
            return ast.parse(source)
    except SyntaxError as exc:
        defect = f"line {exc.lineno}: {exc.msg}"
    except (ValueError, RecursionError, MemoryError) as exc:
        defect = str(exc) or "nested too deeply"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise FormatError(f"a code file that is not Python {version} ({defect})", where=path, fix=_FETCH)


def _class_problems(tree: ast.Module, classes: list[str], path: Path, named_by: str) -> Iterator[WeightkitError]:
    bound = set(_bound(tree))
    for name in classes:
        if name not in bound and "*" not in bound:
            yield ConfigError(
                "a code file without the class that is named",
                where=path,
                expected=f"{name}, as auto_map in {named_by} names it",
                fix=_FETCH,
            )


def _bound(tree: ast.Module) -> Iterator[str]:
    """Every name that the code gives to something, wherever; ``*`` where it imports all that there is."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _imports(tree: ast.Module) -> set[str]:
    """The modules beside this one that it imports from."""
    beside = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    modules = {node.module for node in beside if node.module is not None and "." not in node.module}
    return modules | {alias.name for node in beside if node.module is None for alias in node.names if alias.name != "*"}
