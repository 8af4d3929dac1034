"""Frozen dataclasses of plain values to JSON and back, exactly; what comes back is checked against the annotations."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from weightkit.errors import FormatError

T = TypeVar("T", bound="Record")


class Record:
    """Base of a frozen dataclass whose fields are str, int, float, bool, None, ``Literal``, tuples, dicts by str, or
    records themselves."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values by field, tuples as lists."""
        value: dict[str, Any] = _encode(self)
        return value

    @classmethod
    def from_json(cls: type[T], value: object, *, where: str = "") -> T:
        """The record that ``to_json`` was called on, bit for bit.

        Args:
            value: what ``json.loads`` gives.
            where: the place named in errors.

        Raises:
            FormatError: a field is missing, unknown or of another type, or a number is not finite.
        """
        record: T = _record(cls, value, where or cls.__name__)
        return record


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        cls: Any = type(value)
        return {name: _encode(getattr(value, name)) for name in _kinds(cls)}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return value


@cache
def _kinds(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _record(cls: type, value: object, where: str) -> Any:
    kinds = _kinds(cls)
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    if value.keys() != kinds.keys():
        raise FormatError(
            "other fields than those of this record",
            where=where,
            expected=", ".join(kinds),
            found=", ".join(map(str, value)) or "none",
        )
    return cls(**{name: _decode(kind, value[name], f"{where}.{name}") for name, kind in kinds.items()})


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        return _number(value, where)
    if kind in (int, str, bool, NoneType):
        if type(value) is not kind:
            raise _wrong(where, _WORDS[kind], value)
        return value
    if isinstance(kind, type) and issubclass(kind, Record):
        return _record(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in args:
            raise FormatError("an unknown word", where=where, expected=" or ".join(map(repr, args)), found=repr(value))
        return value
    if origin in (Union, UnionType):
        return _either(args, value, where)
    return _many(origin, args, value, where)


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float):
        raise _wrong(where, _WORDS[float], value)
    if not math.isfinite(value):
        raise FormatError("not a finite number", where=where, found=value)
    return float(value)


def _either(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first of the kinds for None, the one that is not None for all else: no other union is used."""
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    return None if value is None else _decode(kind, value, where)


def _many(origin: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {_decode(str, key, where): _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is not tuple:
        raise TypeError(f"{where}: records hold no {origin}")
    if not isinstance(value, list):
        raise _wrong(where, "a list", value)
    kinds = (args[0],) * len(value) if args[1:] == (...,) else args
    if len(kinds) != len(value):
        raise FormatError("a list of another length", where=where, expected=len(kinds), found=len(value))
    return tuple(
        _decode(kind, item, f"{where}[{at}]") for at, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}


def _wrong(where: str, expected: str, value: object) -> FormatError:
    return FormatError("a value of another type", where=where, expected=expected, found=type(value).__name__)
