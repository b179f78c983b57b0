"""`smelt clean [FOLDER]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smelt.cli.options import Flag, Json, Quiet
from smelt.cli.show import counted, size_text, visible
from smelt.storage.leftovers import Leftover, leftovers, remove_leftover


def clean(
    folder: Annotated[Path, Parameter(show_default=False)] = Path(),
    /,
    *,
    only_list: Annotated[Flag, Parameter(name="--list")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Remove what cut-off merges have left.

    Unfinished outputs, their journals and locks. Outputs stay as they are.

    Parameters
    ----------
    folder
        A folder in which outputs lie, or one output; the working folder by default.
    only_list
        Show what is there, and remove nothing.
    quiet
        Print nothing but errors.
    as_json
        Print the result as JSON.
    """
    found = leftovers(folder)
    for leftover in found:
        if not only_list and not leftover.busy:
            remove_leftover(leftover)
        if not quiet and not as_json:
            print(visible(_line(leftover, only_list=only_list)))
    if as_json:
        rows = [_as_json(leftover, removed=not only_list and not leftover.busy) for leftover in found]
        print(json.dumps({"ok": True, "leftovers": rows}, indent=1))
    elif not found and not quiet:
        print(visible(f"{folder}: nothing is left of any merge"))
    return 0


def _line(leftover: Leftover, *, only_list: bool) -> str:
    what = f"{counted(leftover.tensors, 'finished tensor')}, {size_text(leftover.bytes)}"
    if leftover.busy:
        return f"{leftover.out}: a merge is at work on it"
    return f"{leftover.out}: unfinished, {what}" if only_list else f"{leftover.out}: removed {what}"


def _as_json(leftover: Leftover, *, removed: bool) -> dict[str, object]:
    return {
        "out": str(leftover.out),
        "tensors": leftover.tensors,
        "bytes": leftover.bytes,
        "busy": leftover.busy,
        "removed": removed,
    }
