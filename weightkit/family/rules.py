"""The patterns of GPTQ's ``dynamic`` rules, matched against module names in bounded time, whatever the pattern.

The rules are Python regular expressions, matched from a name's beginning (``re.match``). ``re`` itself backtracks, and
a hostile config could name a pattern on which that takes for ever. Here a pattern is a set of positions (Glushkov's
automaton): a name's characters take it from one set to the next, so the time is the name's length times the pattern's.

Known: literals, ``.``, ``[...]``, ``\\d \\w \\s`` and their opposites, escaped punctuation, groups ``(...)`` and
``(?:...)``, ``|``, ``*``, ``+``, ``?`` (and their lazy forms, which match the same names), ``^`` at the start, ``$`` at
the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

MAX_RULES = 256
MAX_LENGTH = 512
_MAX_DEPTH = 20
#: Transitions kept; a hostile pattern could have exponentially many.
_MAX_KNOWN = 100_000
_CLASSES = frozenset("dDwWsS")


class PatternError(ValueError):
    """A pattern that is none, or that has more than is known here."""


class _Part(NamedTuple):
    """A piece of the pattern: whether it matches nothing at all, the positions it can begin and end at (bit masks)."""

    empty: bool
    first: int
    last: int


class Pattern:
    """A compiled pattern. Raises ``PatternError``."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise PatternError(f"longer than {MAX_LENGTH} characters")
        self._text, self._at, self._depth = text, 0, 0
        self._to_end = False
        self._accepts: list[Callable[[str], object]] = []
        self._follow: list[int] = []
        self._empty, self._first, self._last = self._alternatives()
        if self._at != len(text):
            raise PatternError(f"an unbalanced ) at {self._at}")
        self._by_character: dict[str, int] = {}
        self._known: dict[tuple[int, str], tuple[int, bool]] = {}

    def match(self, name: str) -> bool:
        """Whether ``re.match(pattern, name)`` would find something."""
        ended = self._empty
        if ended and not self._to_end:
            return True
        active, known = self._first, self._known
        for character in name:
            step = known.get((active, character)) or self._step(active, character)
            active, ended = step
            if ended and not self._to_end:
                return True
            if not active and not ended:
                return False
        return ended

    def _step(self, active: int, character: str) -> tuple[int, bool]:
        """The positions that may come next, and whether the pattern may have ended with this character."""
        if character not in self._by_character:
            fits = (1 << number for number, accepts in enumerate(self._accepts) if accepts(character))
            self._by_character[character] = sum(fits)
        matched, following = active & self._by_character[character], 0
        ended, rest = bool(matched & self._last), matched
        while rest:
            lowest = rest & -rest
            following |= self._follow[lowest.bit_length() - 1]
            rest ^= lowest
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[active, character] = following, ended
        return following, ended

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _alternatives(self) -> _Part:
        whole = self._sequence()
        while self._peek() == "|":
            self._at += 1
            other = self._sequence()
            whole = _Part(whole.empty or other.empty, whole.first | other.first, whole.last | other.last)
            if self._to_end:
                raise PatternError("a $ that ends one of several alternatives")
        return whole

    def _sequence(self) -> _Part:
        whole = _Part(True, 0, 0)
        while (character := self._peek()) and character not in "|)":
            if character == "^" and self._at == 0:
                self._at += 1
                continue
            if character == "$" and self._at == len(self._text) - 1 and not self._depth:
                self._at += 1
                self._to_end = True
                break
            part = self._quantified()
            self._link(whole.last, part.first)
            whole = _Part(
                whole.empty and part.empty,
                whole.first | part.first * whole.empty,
                part.last | whole.last * part.empty,
            )
        return whole

    def _quantified(self) -> _Part:
        part = self._atom()
        if (quantifier := self._peek()) not in ("*", "+", "?"):
            return part
        self._at += 1
        if self._peek() == "?":
            self._at += 1
        if self._peek() in ("*", "+", "?", "{"):
            raise PatternError(f"a quantifier of a quantifier at {self._at}")
        if quantifier != "?":
            self._link(part.last, part.first)
        return part._replace(empty=part.empty or quantifier != "+")

    def _atom(self) -> _Part:
        start, character = self._at, self._peek()
        self._at += 1
        if character == "(":
            return self._group()
        if character == "[":
            return self._position(self._class(start))
        if character == "\\":
            escaped = self._peek()
            self._at += 1
            if not escaped or (escaped.isalnum() and escaped not in _CLASSES):
                raise PatternError(f"\\{escaped} at {start}")
            return self._position(re.compile(f"\\{escaped}").fullmatch)
        if character == ".":
            return self._position(lambda found: found != "\n")
        if character in "*+?{}^$":
            raise PatternError(f"{character} at {start}")
        return self._position(character.__eq__)

    def _group(self) -> _Part:
        if self._peek() == "?":
            if self._text[self._at : self._at + 2] != "?:":
                raise PatternError(f"({self._text[self._at : self._at + 3]} at {self._at - 1}")
            self._at += 2
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PatternError("groups nested too deep")
        part = self._alternatives()
        if self._peek() != ")":
            raise PatternError("an unbalanced (")
        self._at += 1
        self._depth -= 1
        return part

    def _class(self, start: int) -> Callable[[str], object]:
        found = re.compile(r"\[\^?\]?(?:\\.|[^\]\\[])*\]", re.DOTALL).match(self._text, start)
        if found is None:
            raise PatternError(f"a set without end at {start}")
        self._at = found.end()
        try:
            return re.compile(found[0]).fullmatch
        except re.error as exc:
            raise PatternError(f"{found[0]}: {exc}") from None

    def _position(self, accepts: Callable[[str], object]) -> _Part:
        self._accepts.append(accepts)
        self._follow.append(0)
        bit = 1 << (len(self._accepts) - 1)
        return _Part(False, bit, bit)

    def _link(self, ends: int, begins: int) -> None:
        while ends:
            lowest = ends & -ends
            self._follow[lowest.bit_length() - 1] |= begins
            ends ^= lowest
