"""What merges that were cut off have left beside their outputs: found, described, and removed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smelt.errors import InputError, StorageError
from smelt.storage import files, journal
from smelt.storage.locking import lock_folder
from smelt.storage.places import BUILD, JOURNAL, OLD, Places, heal_locked, remove


@dataclass(frozen=True, slots=True)
class Leftover:
    """What is left of one merge into `out`: its tensors that are finished, and the bytes that it takes on the disk.

    `busy` where a run is at work on it now.
    """

    out: Path
    tensors: int
    bytes: int
    busy: bool


def leftovers(folder: Path) -> list[Leftover]:
    """What cut-off merges have left in a folder of outputs, or of the output `folder` itself.

    Raises InputError when there is neither the folder nor anything of an output of that name, StorageError when the
    system refuses.
    """
    folder = Path(folder)
    outs = []
    if os.path.realpath(folder) != os.path.realpath(os.sep) and _pieces(Places.of(folder)):
        outs.append(Places.of(folder).out)
    if files.kind(folder) == "folder":
        outs += _outs(Path(os.path.realpath(folder)))
    elif not outs:
        raise InputError("there is no such folder", where=[str(folder)], fix="name the folder in which outputs lie")
    return [_described(Places.of(out)) for out in dict.fromkeys(outs)]


def remove_leftover(leftover: Leftover) -> None:
    """Remove what is left of a merge; a former output that it had put aside is put back.

    Raises StorageError where a run is at work on it.
    """
    places = Places.of(leftover.out)
    lock = lock_folder(places.build)
    try:
        heal_locked(places)
        remove(places.journal)
        remove(places.build)
    finally:
        lock.release()


def _outs(folder: Path) -> list[Path]:
    """The outputs in a folder beside which there is something."""
    found: dict[Path, None] = {}
    for name in files.list_folder(folder):
        for end in (BUILD, OLD, BUILD + JOURNAL, BUILD + ".lock"):
            if name.startswith(".") and name.endswith(end) and len(name) > len(end) + 1:
                found[folder / name[1 : -len(end)]] = None
    return [out for out in found if not files.is_link(out)]  # of a link, what lies beside its target counts


def _pieces(places: Places) -> list[Path]:
    beside = (places.build, places.journal, places.old, places.build.with_name(f"{places.build.name}.lock"))
    return [path for path in beside if files.kind(path) is not None]


def _described(places: Places) -> Leftover:
    found = journal.read(places.journal)
    size = sum(_bytes(path) for path in _pieces(places) if not files.is_link(path))
    try:
        lock_folder(places.build).release()
        busy = False
    except StorageError as error:
        if files.code(error) is not None:  # not ours to lock
            raise
        busy = True
    return Leftover(places.out, 0 if found is None else len(found.finished), size, busy)


def _bytes(path: Path) -> int:
    return sum(there[0] for file in _files(path) if (there := files.stamp(file)) is not None)


def _files(path: Path) -> Iterator[Path]:
    if files.kind(path) == "folder":
        for name in files.list_folder(path):
            if not files.is_link(path / name):
                yield from _files(path / name)
    else:
        yield path
