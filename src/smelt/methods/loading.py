"""Methods from outside the package: a Python file that a recipe names, or an installed entry point.

Both are code of somebody's own. A file is run only when the user says so; an entry point was installed by them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType

from smelt.errors import RecipeError
from smelt.methods import api

GROUP = "smelt.methods"
"""The entry point group of packages that bring methods."""


def load_file(path: Path) -> list[str]:
    """Run a Python file that registers methods, and give their names.

    Loading the same file again replaces its methods. Raises RecipeError: no such file, an error in it (with its line),
    no method in it, or a name that is taken.
    """
    path = path.resolve()
    if not path.is_file():
        raise RecipeError(f"there is no method file {path}", fix="the path is relative to the recipe's folder")
    name = f"smelt_method_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path.name} is not a Python file", where=[str(path)], fix="give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"the method file {path.name} cannot be loaded: {type(error).__name__}: {error}",
            where=[line_of(error, path.name, str(path))],
            fix="correct the file",
        ) from error
    found = [info.name for info in api.registered() if info.type.__module__ == name]
    if not found:
        raise RecipeError(
            f"the method file {path.name} registers no method", where=[str(path)], fix="decorate a class with @register"
        )
    return found


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


def line_of(error: BaseException, file: str, path: str) -> str:
    """`mine.py:12: return x +`: the innermost line of `path` in an error's trace."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{file}:{error.lineno}: {(error.text or '').strip()}"
    trace: TracebackType | None = error.__traceback__
    frames = [frame for frame in traceback.extract_tb(trace) if frame.filename == path]
    return f"{file}:{frames[-1].lineno}: {frames[-1].line}" if frames else path
