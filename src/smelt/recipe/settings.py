"""Settings: a scalar, a gradient over the layers, or cases by tensor name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from smelt.errors import nearest
from smelt.recipe.document import MAX_INTEGER, KeyPath
from smelt.recipe.faults import Fault, describe, refuse

Plain: TypeAlias = bool | int | float | str

_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_YES_AND_NO = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_CASE_KEYS = ("filter", "match", "value")


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value for every tensor. (`cache`, here and below: where `select` keeps what it found.)"""

    value: Plain
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values spread over the layers: the first one at the first layer, the last one at the last."""

    values: tuple[Plain, ...]
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_numeric(self) -> bool:
        """Whether values between two of these exist; of words and booleans one is taken."""
        return not any(isinstance(value, (bool, str)) for value in self.values)


@dataclass(frozen=True, slots=True)
class Case:
    """A value for the tensors whose name contains `filter` or fits the glob `match`; for all, where both are None."""

    filter: str | None
    match: str | None
    value: Scalar | Gradient
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_all(self) -> bool:
        return self.match is None and self.filter in (None, "*")

    @property
    def text(self) -> str:
        """The condition as the recipe writes it: `filter: mlp`."""
        if self.match is not None:
            return f"match: {self.match}"
        return "all" if self.filter is None else f"filter: {self.filter}"


@dataclass(frozen=True, slots=True)
class Conditional:
    """Cases, of which the first that fits a tensor's name holds."""

    cases: tuple[Case, ...]


Setting: TypeAlias = Scalar | Gradient | Conditional


def scalars(setting: Setting, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Plain]]:
    """Every single value of a setting, each with its path."""
    if isinstance(setting, Scalar):
        yield path, setting.value
    elif isinstance(setting, Gradient):
        for index, value in enumerate(setting.values):
            yield (*path, index), value
    else:
        for index, case in enumerate(setting.cases):
            yield from scalars(case.value, (*path, index, "value"))


def has_gradient(setting: Setting) -> bool:
    """Whether the value of a setting, or of one of its cases, depends on the layer."""
    values = [case.value for case in setting.cases] if isinstance(setting, Conditional) else [setting]
    return any(isinstance(value, Gradient) and len(set(value.values)) > 1 for value in values)


def read_setting(value: Any) -> Setting:
    """A setting from plain values. A numeric text (`"1e-5"`) is a number, YAML 1.1's yes/no/on/off are booleans.

    Raises, inside pydantic, every fault with its path.
    """
    if isinstance(value, (Scalar, Gradient, Conditional)):
        return value
    faults: list[Fault] = []
    setting = _read(value, faults)
    if faults or setting is None:
        refuse(faults)
    return setting


def read_boolean(value: Any) -> Any:
    """YAML 1.1's yes/no/on/off as booleans; anything else as it is."""
    return _YES_AND_NO.get(value.lower(), value) if isinstance(value, str) else value


def _read(value: Any, faults: list[Fault]) -> Setting | None:
    if isinstance(value, dict):  # MergeKit also takes one case without the list around it
        if not any(key in _CASE_KEYS or _meant_case_key(key) for key in value):
            fix = "give each model a value of its own: `parameters:` beside its `model:`"
            faults.append(Fault("a setting cannot be a mapping from names to values", (), fix))
            return None
        case = _read_case(value, (), faults)
        return Conditional((case,)) if case else None
    if isinstance(value, (list, tuple)) and any(isinstance(entry, dict) for entry in value):
        return _read_cases(value, faults)
    return _read_value(value, (), faults)


def _read_cases(entries: list[Any] | tuple[Any, ...], faults: list[Fault]) -> Setting | None:
    if not all(isinstance(entry, dict) for entry in entries):
        index = next(index for index, entry in enumerate(entries) if not isinstance(entry, dict))
        fix = "write it as `- value: ...` (all other tensors, last in the list), or use a list of numbers alone"
        faults.append(Fault(f"{describe(entries[index])} stands among `filter:` entries", (index,), fix))
        return None
    cases = [_read_case(entry, (index,), faults) for index, entry in enumerate(entries)]
    for index, case in enumerate(cases[:-1]):
        if case is not None and case.is_all and set(entries[index]) <= set(_CASE_KEYS):
            fix = "move it to the end of the list"
            faults.append(Fault("this entry holds for all tensors, so those after it are never used", (index,), fix))
    return Conditional(tuple(case for case in cases if case is not None))


def _read_case(entry: dict[str, Any], path: KeyPath, faults: list[Fault]) -> Case | None:
    for key in entry:
        if key not in _CASE_KEYS:
            close = _meant_case_key(key)
            known = f"did you mean `{close}`?" if close else f"known here: {', '.join(_CASE_KEYS)}"
            faults.append(Fault(f"unknown key `{key}`", (*path, key), known))
    conditions: dict[str, Any] = {key: entry[key] for key in ("filter", "match") if entry.get(key) is not None}
    for key, condition in conditions.items():
        if not isinstance(condition, str):
            fix = f'put it in quotes: "{condition}"' if isinstance(condition, (int, float)) else None
            faults.append(Fault(f"`{key}` must be text, not {describe(condition)}", (*path, key), fix))
        elif not condition:
            faults.append(Fault(f"`{key}` is empty", (*path, key), f"leave out `{key}` to mean all tensors"))
    if len(conditions) == 2:
        faults.append(Fault("`filter` and `match` in one entry", (*path, "match"), "use one of the two"))
    if "value" not in entry:
        if not any(_meant_case_key(key) == "value" for key in entry if key not in _CASE_KEYS):
            faults.append(Fault("an entry without `value`", path, "add `value: ...`"))
        return None
    value = _read_value(entry["value"], (*path, "value"), faults)
    return None if value is None else Case(conditions.get("filter"), conditions.get("match"), value)


def _meant_case_key(key: str) -> str | None:
    """The key of a case that is meant by an unknown one; MergeKit's first recipes wrote `pattern`."""
    return {"pattern": "filter", "glob": "match"}.get(key) or nearest(key, _CASE_KEYS)


def _read_value(value: Any, path: KeyPath, faults: list[Fault]) -> Scalar | Gradient | None:
    if not isinstance(value, (list, tuple)):
        single = _read_scalar(value, path, faults)
        return None if single is None else Scalar(single)
    if not value:
        faults.append(Fault("an empty list is no value", path, "give one number, or one per step of a gradient"))
        return None
    values = [_read_scalar(entry, (*path, index), faults) for index, entry in enumerate(value)]
    return Gradient(tuple(entry for entry in values if entry is not None))


def _read_scalar(value: Any, path: KeyPath, faults: list[Fault]) -> Plain | None:
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str) and value.strip():
        return _read_text(value, path, faults)
    if value is None or value == "":
        faults.append(Fault("a setting without a value", path, "give a value, or remove the key"))
    else:
        faults.append(Fault(f"a setting must be a number, true, false or a word, not {describe(value)}", path))
    return None


def _read_text(text: str, path: KeyPath, faults: list[Fault]) -> Plain | None:
    if _NUMBER.fullmatch(text):
        number = float(text)
        if math.isfinite(number):
            whole = text.lstrip("+-").isdecimal() and abs(number) < MAX_INTEGER
            return int(text) if whole else number
        faults.append(Fault("the number is too large", path))
        return None
    word: Plain = _YES_AND_NO.get(text.lower(), text)
    return word
