"""Problems found in a tree before it is known where in a file they stand, carried out of pydantic unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from smelt.recipe.document import KeyPath, shorten, visible

FAULT = "recipe_fault"
"""The pydantic error type under which a Fault travels; message and fix are in its context."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong at `path` (relative to where it was found), and how to fix it.

    `at_value`: the value is wrong, and the error points at it; else at the key or list entry.
    """

    message: str
    path: KeyPath = ()
    fix: str | None = None
    at_value: bool = False


def refuse(faults: Sequence[Fault]) -> NoReturn:
    """Raise faults inside a pydantic validator; pydantic puts the place of the field before each path."""
    raise ValidationError.from_exception_data(
        "recipe",
        [
            InitErrorDetails(
                type=PydanticCustomError(FAULT, "{message}", {"message": fault.message, "fix": fault.fix or ""}),
                loc=fault.path,
                input=None,
            )
            for fault in faults
        ],
    )


def describe(value: object) -> str:
    """A given value in words, for `must be a number, not ...`.

    >>> describe([1, 2])
    'a list'
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{shorten(visible(value))}'"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a mapping" if isinstance(value, dict) else str(value)
