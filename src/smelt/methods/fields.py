"""A method's parameters, each declared once: type, default, range, per model or for the whole method.

The recipe's validation, the command line's help, the documentation and the model card all read these records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal


class _Required:
    def __repr__(self) -> str:
        return "required"


required: Final = _Required()
"""The default of a parameter that the recipe must set."""

Kind = Literal["float", "int", "bool", "word"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A range of allowed numbers, written `[0, 1]`, `(0, inf)`, ...

    >>> Interval.parse("(0, 1]").holds(0.0)
    False
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    text: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str) -> Interval:
        """Read `[0, 1]`, `(0, inf)` and the like. Raises ValueError."""
        if not (text[:1] in "[(" and text[-1:] in "])" and text.count(",") == 1):
            raise ValueError(f"'{text}' is no interval: write [0, 1] or (0, inf)")
        low, high = text[1:-1].split(",")
        return cls(float(low), float(high), text[0] == "(", text[-1] == ")", text)

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below


@dataclass(frozen=True, slots=True)
class Field:
    """One parameter of a method.

    `name` is the recipe's key, `attribute` the Python name, `words` the strings allowed beside values of `kind`; a
    field of kind `word` has no other values.
    """

    default: Any
    per_model: bool
    doc: str
    within: Interval | None = None
    words: tuple[str, ...] = ()
    name: str = ""
    attribute: str = ""
    kind: Kind = "float"

    @property
    def is_required(self) -> bool:
        return self.default is required

    def check(self, value: object) -> Any:
        """The value in this field's type; ValueError (what was expected) if it does not fit.

        >>> Field(1.0, False, "", Interval.parse("[0, 1]")).check("5e-1")
        0.5
        """
        if isinstance(value, str) and value in self.words:
            return value
        if self.kind == "word":
            raise ValueError("must be " + " or ".join(f"'{word}'" for word in self.words))
        number = _number(value)
        if self.kind == "bool":
            if isinstance(value, bool):
                return value
            if number is not None and number in (0.0, 1.0):
                return bool(number)
            raise ValueError(self._expected("true or false"))
        if number is None or isinstance(value, bool):
            raise ValueError(self._expected("a whole number" if self.kind == "int" else "a number"))
        if not math.isfinite(number):
            raise ValueError(self._expected("a finite number"))
        if self.kind == "int" and number != int(number):
            raise ValueError(self._expected("a whole number"))
        if self.within is not None and not self.within.holds(number):
            raise ValueError(f"must lie in {self.within.text}, not {number:g}")
        return int(number) if self.kind == "int" else number

    def _expected(self, what: str) -> str:
        return f"must be {what}" + "".join(f" or '{word}'" for word in self.words)


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def per_model(default: object, *, doc: str, within: str | None = None, name: str = "") -> Any:
    """Declare a number that each model has for itself; it reaches the method as a float64 array [n, 1, ...]."""
    return Field(default, True, doc, Interval.parse(within) if within else None, name=name)


def scalar(default: object, *, doc: str, within: str | None = None, words: tuple[str, ...] = (), name: str = "") -> Any:
    """Declare one value for the whole method; it reaches the method as a plain Python value."""
    return Field(default, False, doc, Interval.parse(within) if within else None, words, name)
