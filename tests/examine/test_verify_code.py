"""Code that an auto_map names: missing, broken, without the class, hostile. None of it is ever run."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from weightkit.errors import ConfigError, FormatError, MissingFileError, WeightkitError
from weightkit.examine.code import MAX_CODE_BYTES, code_problems

TARGET = {"config.json": {"auto_map": {"AutoModel": "modeling_x.Y"}}}


def problems_of(folder: Path, code: str | bytes) -> list[WeightkitError]:
    (folder / "modeling_x.py").write_bytes(code.encode() if isinstance(code, str) else code)
    return list(code_problems(folder, TARGET))


@pytest.mark.parametrize(
    "code",
    [
        "class Y: ...",
        "if 1:\n    class Y: ...\n",
        "def _y(): ...\nY = _y",
        "from somewhere import Z as Y",
        "from somewhere import *",
        "# -*- coding: latin-1 -*-\nclass Y:\n    '\\d'  # an escape that Python warns of\n",
        "raise SystemExit  # never run\nclass Y: ...",
    ],
)
def test_code_that_is_right(code: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert problems_of(tmp_path, code) == []
    assert not recwarn


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("class Y:\ndef f(:\n", "line 2: "),
        ("class Y: ...\nx = '\n", "line 2: "),
        (b"class Y: ...\0", "null bytes"),
        (b"class Y: '\xff'", "not Python"),
        ("class Y: ...\n" + "(" * 10_000, "not Python"),
        ("class Y: ...\nx = " + "-" * 200_000 + "1", "not Python"),
    ],
    ids=["syntax", "string", "null", "encoding", "brackets", "depth"],
)
def test_code_that_does_not_parse(code: str | bytes, what: str, tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, code)
    assert isinstance(problem, FormatError)
    assert problem.where == str(tmp_path / "modeling_x.py")
    assert what in problem.what


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "modeling_x.py").touch()
    monkeypatch.setattr(Path, "open", refuse)
    (problem,) = code_problems(tmp_path, TARGET)
    assert "modeling_x.py: cannot be read (Permission denied)." in problem.message


def test_a_file_too_large_to_parse(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "class Y: ...\n" + "#" * MAX_CODE_BYTES)
    assert "too large" in problem.what


def test_the_class_is_not_there(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "class Z: ...")
    assert isinstance(problem, ConfigError)
    assert str(problem.expected).startswith("Y, as auto_map in config.json")


@pytest.mark.parametrize("line", ["from .helper import a", "from .helper import (\n    a,\n)", "from . import helper"])
def test_what_it_imports_from_beside_it(line: str, tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, f"{line}\nclass Y: ...")
    assert isinstance(problem, MissingFileError)
    assert problem.where == str(tmp_path / "helper.py")
    (tmp_path / "helper.py").write_text("from .modeling_x import Y\nfrom .deeper import b\n")  # a ring ends
    (tmp_path / "deeper.py").write_text("def (")
    (problem,) = code_problems(tmp_path, TARGET)
    assert problem.where == str(tmp_path / "deeper.py")


def test_an_import_in_a_text_is_none(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "class Y:\n    '''\n    from .helper import a\n    '''\n") == []


@pytest.mark.parametrize("target", ["modeling_x", "../a.X", "a.b.C", "", "a.", ".C"])
def test_what_names_no_class(target: str, tmp_path: Path) -> None:
    (problem,) = code_problems(tmp_path, {"config.json": {"auto_map": {"AutoModel": target}}})
    assert (problem.where, problem.found) == (str(tmp_path / "config.json"), target)


def test_code_elsewhere_is_not_looked_for(tmp_path: Path) -> None:
    auto_map = {"AutoModel": "owner/name--modeling_x.Y", "AutoConfig": "sub/configuration_x.X"}
    tokenizer = {"auto_map": {"AutoTokenizer": ["owner/name--tokenization_x.T", None]}}
    contents = {"config.json": {"auto_map": auto_map}, "tokenizer_config.json": tokenizer}
    assert list(code_problems(tmp_path, contents)) == []
