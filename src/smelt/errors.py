"""What can go wrong, said for people: what happened, where, and how to fix it.

Code deep inside raises the plainest of these; the boundary (the CLI, or a caller) prints `render()`.
Each class names the exit code with which the command line ends.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SmeltError(Exception):
    """One problem: `message` (what), `where` (a line each: file, tensor, recipe line, models), `fix` (what to do).

    >>> print(SmeltError("shapes differ", where=["base [2, 3]"], fix="drop the model").render())
    error: shapes differ
      base [2, 3]
      fix: drop the model
    """

    exit_code = 1

    def __init__(self, message: str, *, where: Sequence[str] = (), fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = tuple(where)
        self.fix = fix

    @property
    def problems(self) -> tuple[SmeltError, ...]:
        """The single problems of this error: itself, or those it gathers."""
        return (self,)

    def render(self) -> str:
        """The problem as the command line prints it."""
        lines = [f"error: {self.message}", *(f"  {line}" for line in self.where)]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __str__(self) -> str:
        parts = [self.message, *self.where]
        if self.fix:
            parts.append(f"fix: {self.fix}")
        return "; ".join(parts)


class RecipeError(SmeltError):
    """The recipe or the command line is wrong (exit code 2)."""

    exit_code = 2


class InputError(SmeltError):
    """A model, a file or a header that was given is wrong (exit code 3)."""

    exit_code = 3


class StorageError(SmeltError):
    """The operating system refused: reading, writing, space, permission (exit code 4)."""

    exit_code = 4


class NumericError(SmeltError):
    """The arithmetic gave what must not be written, such as a new NaN (exit code 5)."""

    exit_code = 5


class ManyProblems(SmeltError):
    """Several problems found together; the exit code is that of the first."""

    def __init__(self, problems: Sequence[SmeltError]) -> None:
        super().__init__(f"{len(problems)} problems")
        self._problems = tuple(problems)
        self.exit_code = self._problems[0].exit_code

    @property
    def problems(self) -> tuple[SmeltError, ...]:
        return self._problems

    def render(self) -> str:
        return "\n".join(problem.render() for problem in self._problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self._problems)


def raise_all(problems: Iterable[SmeltError]) -> None:
    """Raise what was found: nothing, the one problem, or all of them together (each said once)."""
    found: dict[str, SmeltError] = {}
    for problem in problems:
        for single in problem.problems:
            found.setdefault(single.render(), single)
    if len(found) == 1:
        raise next(iter(found.values()))
    if found:
        raise ManyProblems(tuple(found.values()))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` most likely meant, or None.

    >>> nearest("dype", ["dtype", "models"])
    'dtype'
    """
    candidates = list(known)
    lowered = {name.lower(): name for name in reversed(candidates)}
    close = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[close[0]] if close else None
