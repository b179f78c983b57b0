"""Methods from outside the package: a Python file that a recipe names, or an installed entry point.

Both are code of somebody's own. A file is run only when the user says so; an entry point was installed by them. What
such code does wrong is told with the line of its file.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from smelt.errors import RecipeError, SmeltError
from smelt.methods import api

GROUP = "smelt.methods"
"""The entry point group of packages that bring methods."""


@dataclass(frozen=True, slots=True)
class MethodFile:
    """A method file that was run: the names it registered, and the sha256 of the bytes that were run."""

    names: tuple[str, ...]
    sha256: str

    def unload(self) -> None:
        """Forget its methods: the next recipe must name the file itself."""
        for name in self.names:
            api.forget(name)


def load_file(path: Path) -> MethodFile:
    """Run a Python file that registers methods.

    Raises RecipeError: no such file, an error in it (with its line), no method in it, or a name that is taken. Then it
    has registered nothing.
    """
    path = path.resolve()
    if not path.is_file():
        raise RecipeError(f"there is no method file {path}", fix="the path is relative to the recipe's folder")
    known = set(api.names())  # all of the package first, so that a name that is taken is this file's mistake
    data = path.read_bytes()
    module = ModuleType(f"smelt_method_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        # Not imported: the import system may take an older compilation of a file that was edited within a second.
        exec(compile(data, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        for name in set(api.names()) - known:
            api.forget(name)
        raise RecipeError(
            f"the method file {path.name} cannot be loaded: {type(error).__name__}: {error}",
            where=[line_of(error, path)],
            fix="correct the file",
        ) from error
    found = sorted(set(api.names()) - known)
    if not found:
        fix = "decorate a class with @register"
        raise RecipeError(f"the method file {path.name} registers no method", where=[str(path)], fix=fix)
    return MethodFile(tuple(found), hashlib.sha256(data).hexdigest())


def load_entry_points() -> None:
    """Import what installed packages offer under `smelt.methods`. Raises RecipeError naming the package that fails."""
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else "unknown"
            raise RecipeError(
                f"the methods of the installed package {package} cannot be loaded: {type(error).__name__}: {error}",
                where=[f"entry point {point.name} = {point.value}"],
                fix=f"update or uninstall {package}",
            ) from error


@contextmanager
def answerable(info: api.MethodInfo, *, at: str = "") -> Iterator[None]:
    """Around every call of a method's own code: what it raises becomes a RecipeError with the line of its file.

    `at` says where the call was made (a tensor). Errors of smelt, and `Undefined`, pass.
    """
    try:
        yield
    except (SmeltError, MemoryError, api.Undefined):
        raise
    except Exception as error:
        if isinstance(error, ImportError) and "failed to map segment" in str(error):
            raise MemoryError(str(error)) from error
        path = Path(inspect.getfile(info.type))
        where = [line_of(error, path), *([at] if at else [])]
        message = f"method {info.name} failed: {type(error).__name__}: {error}"
        raise RecipeError(message, where=where, fix="correct the method") from error


def line_of(error: BaseException, path: Path) -> str:
    """`mine.py:12: return x +`: the innermost line of a file in an error's trace."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path.name}:{error.lineno}: {(error.text or '').strip()}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if not frames or frames[-1].lineno is None:
        return str(path)
    return f"{path.name}:{frames[-1].lineno}: {_line(path, frames[-1].lineno)}"


def definition_of(function: Callable[..., object]) -> str:
    """`mine.py:8: def tile(self, x):`, the line where a method's function begins."""
    code = function.__code__
    path = Path(code.co_filename)
    number = code.co_firstlineno
    while number < code.co_firstlineno + 20 and not _line(path, number).startswith("def "):
        number += 1  # decorators come first
    return f"{path.name}:{number}: {_line(path, number)}"


def _line(path: Path, number: int) -> str:
    try:
        return path.read_text(encoding="utf-8").splitlines()[number - 1].strip()
    except (OSError, IndexError, UnicodeDecodeError):
        return ""
