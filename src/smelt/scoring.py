"""Scores of candidates: a command that is run on each of them, and the number that it prints last."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smelt.errors import InputError, RecipeError, StorageError

_WAIT = 5.0
"""Seconds that a command has to end after it was asked to, when a sweep is interrupted."""
_SHOWN = 5
"""Last lines of a failed command's output that are shown."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A command with `{}` in place of the candidate's folder; no shell sees it. `lowest`: lower scores are better."""

    command: str
    words: tuple[str, ...]
    lowest: bool = False

    @classmethod
    def of(cls, command: str, *, lowest: bool = False) -> Scorer:
        """Read a command line. Raises RecipeError where it cannot be one."""
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise RecipeError(f"the command cannot be read: {error}", where=[command]) from error
        if not any("{}" in word for word in words):
            fix = "write {} where the candidate's folder is to stand: --score 'python evaluate.py {}'"
            raise RecipeError("the command to score with has no {}", where=[command], fix=fix)
        return cls(command, tuple(words), lowest)

    def score(self, folder: Path) -> dict[str, float]:
        """Run the command on a candidate; gives its numbers by name. Raises InputError or StorageError."""
        words = [word.replace("{}", str(folder)) for word in self.words]
        try:
            running = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise StorageError(f"cannot run {words[0]}: {error.strerror}", where=[shlex.join(words)]) from error
        try:
            printed, said = running.communicate()
        except BaseException:
            _end(running)
            raise
        if running.returncode:
            code = running.returncode
            how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            raise InputError(f"the command to score with {how}", where=[shlex.join(words), *_last(said or printed)])
        return read_scores(printed, words)

    def rank(self, scores: Mapping[str, Mapping[str, float]]) -> list[str]:
        """The names of candidates, the best first; equal ones in the order in which they are given."""
        sign = 1.0 if self.lowest else -1.0
        return sorted(scores, key=lambda name: sign * next(iter(scores[name].values())))


def read_scores(printed: str, words: Sequence[str] = ()) -> dict[str, float]:
    """The numbers of the last line that is a number, a name and a number, or a JSON object of numbers.

    A lone number is called `score`. Raises InputError where there is no such line, or its first number is not finite.

    >>> read_scores("loading\\nperplexity 8.25\\n")
    {'perplexity': 8.25}
    """
    for line in reversed(printed.splitlines()):
        found = _numbers(line.strip())
        if not found:
            continue
        if not math.isfinite(next(iter(found.values()))):
            break
        return found
    fix = "print the score in a line of its own: a number, `NAME NUMBER`, or a JSON object of numbers"
    where = [shlex.join(words), *_last(printed)] if words else _last(printed)
    raise InputError("the command to score with printed no number", where=where, fix=fix)


def _numbers(line: str) -> dict[str, float]:
    if line.startswith("{"):
        try:
            tree = json.loads(line)
        except ValueError:
            return {}
        plain = {str(k): v for k, v in tree.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return {name: float(value) for name, value in plain.items()} if len(plain) == len(tree) else {}
    before, _, number = line.rpartition(" ")
    name = before.strip().rstrip(":=").strip()
    try:
        return {name or "score": float(number)} if len(name.split()) <= 1 else {}
    except ValueError:
        return {}


def _last(text: str) -> list[str]:
    return [f"| {line}" for line in text.splitlines()[-_SHOWN:]]


def _end(running: subprocess.Popen[str]) -> None:
    """End a command: politely, then not."""
    running.terminate()
    try:
        running.wait(_WAIT)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
