"""Small JSON files of a checkpoint, read as untrusted input and written the way the hubs write them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from weightkit.errors import FormatError, MissingFileError

#: No index of a checkpoint that exists comes near: 91,991 tensors take 9 MB.
MAX_JSON_BYTES = 256 << 20


class DuplicateKeyError(ValueError):
    """An object names one key twice; readers differ in which of the two they believe."""


def object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """``object_pairs_hook`` for ``json.loads`` that refuses duplicate keys."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise DuplicateKeyError(repeated_key(pairs))
    return result


def repeated_key(pairs: list[tuple[str, object]]) -> str:
    """The first key that stands twice or more."""
    counts = Counter(key for key, _ in pairs)
    return next(key for key, count in counts.items() if count > 1)


def read_json_object(path: Path, error: type[FormatError] = FormatError) -> dict[str, object]:
    """The object in a JSON file. Raises ``error`` for anything else, ``MissingFileError`` where there is no file."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(
                "too large for a JSON file of a checkpoint",
                where=path,
                expected=f"at most {MAX_JSON_BYTES:,} bytes",
                found=f"{size:,}",
            )
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text, object_pairs_hook=object_without_duplicates)
    except FileNotFoundError as exc:
        raise MissingFileError("no such file", where=path) from exc
    except OSError as exc:
        raise error(f"cannot be read ({exc.strerror})", where=path) from exc
    except UnicodeDecodeError as exc:
        raise error(f"not UTF-8 at byte {exc.start}", where=path) from exc
    except DuplicateKeyError as exc:
        raise error(f"the key {str(exc)!r} stands twice", where=path) from exc
    except RecursionError as exc:
        raise error("nested too deeply", where=path) from exc
    except ValueError as exc:
        raise error(f"not JSON ({exc})", where=path) from exc
    if not isinstance(value, dict):
        raise error("not a JSON object", where=path, expected="an object", found=type(value).__name__)
    return value


def json_bytes(value: object) -> bytes:
    """Indented UTF-8 with a final newline, keys in their order."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def strings(values: object) -> Iterator[str]:
    """Every string in nested lists and objects."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from strings(value)
    elif isinstance(values, list):
        for value in values:
            yield from strings(value)
