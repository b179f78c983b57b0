"""Where an output is built, and what is checked and cleared there before anything is written.

Beside OUT lie, while it is written: the build folder `.OUT.smelt-build`, its lock and its journal, and during an
overwriting commit the former output, `.OUT.smelt-old`. All are in one parent, so that a rename moves them.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from smelt.errors import StorageError
from smelt.storage import files
from smelt.storage.files import size_text
from smelt.storage.layout import SINGLE
from smelt.storage.locking import lock_folder

BUILD, OLD, JOURNAL = ".smelt-build", ".smelt-old", ".journal"
"""How the names of what lies beside an output end."""
MARGIN = 16 << 20
"""Bytes of free space asked for beyond the weights: configs, tokenizer, record."""


@dataclass(frozen=True, slots=True)
class Places:
    """The folders and files of one output."""

    out: Path
    build: Path
    old: Path
    journal: Path

    @classmethod
    def of(cls, out: Path) -> Places:
        """The places for `out`, links in it followed. Raises StorageError for what cannot be an output folder."""
        if os.path.islink(out) and files.kind(out) == "link":
            raise StorageError("the output is a link that leads nowhere", where=[str(out)], fix="remove the link")
        out = Path(os.path.realpath(out))
        if not out.name:
            raise StorageError("the output cannot be the root folder", where=[str(out)])
        build, old = (out.with_name(f".{out.name}{end}") for end in (BUILD, OLD))
        return cls(out, build, old, build.with_name(f"{build.name}{JOURNAL}"))


def heal(out: Path) -> None:
    """Undo what a crash during an overwriting commit may have left of `out`; usually there is nothing to do.

    OUT gone: the old one is put back. OUT there: it is complete, and the old one is removed. Raises StorageError when
    another run is writing, or when OUT was made anew by somebody else.
    """
    places = Places.of(Path(out))
    if files.kind(places.old) is None:
        return
    lock = lock_folder(places.build)
    try:
        heal_locked(places)
    finally:
        lock.release()


def heal_locked(places: Places) -> None:
    """`heal`, with the lock held: no other run is between its two renames."""
    if files.kind(places.old) is None:
        return
    if files.is_empty_folder(places.out):
        files.remove_folder(places.out)
    if files.kind(places.out) is None:
        files.rename(places.old, places.out)
        files.sync_folder(places.out.parent)
    elif files.kind(places.build) is None:  # the second rename took place: OUT is the new, complete output
        files.remove_tree(places.old)
    else:
        raise StorageError(
            "an interrupted run left the former output aside, and the output was made anew since",
            where=[f"former {places.old}", f"present {places.out}"],
            fix="keep one of the two: move or remove the other",
        )


# --- checks before anything is written ------------------------------------------------------------------------------


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise StorageError unless `out` is absent, empty, or a folder that may be replaced."""
    there = files.kind(out)
    if there is None:
        return
    if there != "folder":
        raise StorageError("the output exists and is not a folder", where=[str(out)], fix="choose another name")
    if os.path.ismount(out):
        raise StorageError(
            "the output is a mount point, which cannot be replaced",
            where=[str(out)],
            fix="name a folder in it",
        )
    if files.is_empty_folder(out):
        return
    if not overwrite:
        raise StorageError(
            "the output folder is not empty",
            where=[str(out)],
            fix="choose another folder, or replace it whole with --overwrite",
        )
    places = []
    for find in (Path.cwd, Path.home):
        with contextlib.suppress(OSError, RuntimeError):  # a deleted working folder, a user without a home
            places.append(find().resolve())
    holds = [place for place in places if place.is_relative_to(out)]
    if holds or files.kind(out / ".git") is not None:
        why = f"it holds {holds[0]}" if holds else "it is a git repository"
        raise StorageError(f"refusing to replace the output folder: {why}", where=[str(out)], fix="choose another")


def check_space(parent: Path, needed: int) -> None:
    """Raise StorageError unless the file system of `parent` has room for `needed` bytes and the small files."""
    free = files.free_bytes(parent)
    if free < needed + MARGIN:
        raise StorageError(
            f"not enough space: {size_text(needed + MARGIN)} needed, {size_text(free)} free",
            where=[str(parent)],
            fix=f"free {size_text(needed + MARGIN - free)}, or choose another disk",
        )


def remove_stale(places: Places) -> bool:
    """Remove what a run that died has left, and say whether there was anything.

    The lock that we hold says that nobody is at work there. The journal goes first: from then on nothing is trusted.
    """
    build = places.build
    if files.is_link(build) or files.kind(build) not in {None, "folder"}:
        raise StorageError("the build folder's name is taken", where=[str(build)], fix="remove it")
    found = files.kind(build) is not None
    remove(places.journal)
    files.remove_tree(build)
    return found


def remove(path: Path) -> None:
    """Remove what lies at `path`, a file, a folder or a link; nothing there is no error."""
    if files.kind(path) == "folder" and not files.is_link(path):
        files.remove_tree(path)
    else:
        files.remove_file(path)


def make_parents(out: Path) -> list[Path]:
    """Create the folders above `out` that are missing, and return them, the outermost first."""
    missing = []
    folder = out.parent
    while files.kind(folder) is None:
        missing.append(folder)
        folder = folder.parent
    if files.kind(folder) != "folder":
        raise StorageError("the output's parent is not a folder", where=[str(folder)], fix="choose another place")
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            files.make_folder(folder)
            made.append(folder)
    except BaseException:
        unmake(made)
        raise
    return made


def unmake(made: list[Path]) -> None:
    """Remove the folders that `make_parents` made, as far as they are still empty."""
    for folder in reversed(made):
        try:
            files.remove_folder(folder)
        except StorageError:
            return


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise StorageError for an output folder that a build is sure to refuse; nothing is changed.

    What depends on the size of the output, or on other runs, is left to `Build.start`.
    """
    places = Places.of(Path(out))
    if places.out.name.endswith(".safetensors"):
        raise StorageError(
            "the output is a folder, and this is the name of a file",
            where=[str(out)],
            fix=f"write to {places.out.name.removesuffix('.safetensors') or 'out'}: the weights are in its {SINGLE}, "
            "with the record of what they are beside them",
        )
    if files.kind(places.old) is None:  # else an interrupted run is healed first
        check_target(places.out, overwrite=overwrite)
    folder = places.out.parent
    while files.kind(folder) is None:
        folder = folder.parent
    if files.kind(folder) != "folder":
        raise StorageError("the output's parent is not a folder", where=[str(folder)], fix="choose another place")
    if reason := files.refuses_writes(folder):
        raise StorageError(
            f"the output's folder cannot be written to: {reason}",
            where=[str(folder)],
            fix="check the permissions, or choose another folder",
        )
