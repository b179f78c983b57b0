"""`sweep.json`: the candidates of a sweep beside them, and what says that one of them is there already.

A row is written before its candidate is, with the identity of what will be there, and the former folder's digest where
there is one. So after a crash a whole folder is known for the candidate that it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smelt._version import __version__
from smelt.errors import InputError, StorageError
from smelt.lineage.record import RECORD, file_digest
from smelt.lineage.trusted import check_record
from smelt.recipe.settings import Plain
from smelt.storage import files
from smelt.storage.sources.local import open_folder

INDEX = "sweep.json"
FORMAT = 1
PENDING, WRITTEN, FAILED, REMOVED = "pending", "written", "failed", "removed"
_NEW = ".sweep.json.new"
_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate: its folder beside the index has its name.

    `identity` is the digest of all that its bytes follow from, `digest` the sha256 of its `smelt.json` where it is
    written, `replaces` that of a folder which it is to replace; `scores` by the command that the index names.
    """

    name: str
    settings: Mapping[str, Plain]
    identity: str
    state: str = PENDING
    digest: str | None = None
    replaces: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(slots=True)
class Listing:
    """The rows of a sweep's folder by name; those of other sweeps into it stay."""

    folder: Path
    rows: dict[str, Row]
    scored_by: str | None = None
    lowest: bool = False
    keep_best: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Listing:
        """What lies in a folder; no rows where there is no index. Raises InputError where it is no index of a sweep."""
        path = folder / INDEX
        if files.kind(path) is None:
            return cls(folder, {})
        broken = InputError(
            f"{INDEX} is not the index of a sweep that this version reads",
            where=[str(path)],
            fix="choose another folder, or remove the file: its candidates are then strangers",
        )
        try:
            tree = json.loads(files.read_bytes(path, limit=_LIMIT))
            if tree["format"] != FORMAT:
                raise broken
            scored = tree["scored_by"] or {}
            rows = {row["name"]: Row(**{key: row[key] for key in row if key != "folder"}) for row in tree["candidates"]}
            return cls(folder, rows, scored.get("command"), scored.get("best") == "lowest", tree["keep_best"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise broken from error

    def put(self, name: str, **what: Any) -> None:
        """Change a row, and write the index."""
        self.rows[name] = replace(self.rows[name], **what)
        self.write()

    def write(self) -> None:
        """Replace the index as a whole. Raises StorageError."""
        tree: dict[str, Any] = {
            "format": FORMAT,
            "smelt": __version__,
            "scored_by": None
            if self.scored_by is None
            else {"command": self.scored_by, "best": "lowest" if self.lowest else "highest"},
            "keep_best": self.keep_best,
            "candidates": [_as_json(row) for row in self.rows.values()],
        }
        files.remove_file(self.folder / _NEW)
        files.write_bytes(self.folder / _NEW, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())
        files.rename(self.folder / _NEW, self.folder / INDEX)

    def remove(self) -> None:
        """Take the index away."""
        files.remove_file(self.folder / _NEW)
        files.remove_file(self.folder / INDEX)

    def is_there(self, name: str, identity: str) -> bool:
        """Whether a candidate's folder holds what it is to hold, as far as index, record and headers tell."""
        row = self.rows.get(name)
        if row is None or row.identity != identity or row.state not in (PENDING, WRITTEN, REMOVED):
            return False
        digest = record_digest(self.folder / name)
        if digest is None or digest == row.replaces or (row.digest is not None and row.digest != digest):
            return False
        try:
            checkpoint = open_folder(self.folder / name, name=name)
        except (InputError, StorageError):
            return False
        try:
            check_record(checkpoint, self.folder / name)
        except InputError:
            return False
        finally:
            checkpoint.close()
        return True


def record_digest(folder: Path) -> str | None:
    """The sha256 of a folder's `smelt.json`, which has the digests of all else; None where there is none."""
    if files.kind(folder / RECORD) != "file":
        return None
    return file_digest(files.read_bytes(folder / RECORD, limit=1 << 30))


def _as_json(row: Row) -> dict[str, Any]:
    tree = {
        "name": row.name,
        "folder": row.name,
        "settings": dict(row.settings),
        "state": row.state,
        "identity": row.identity,
        "digest": row.digest,
        "replaces": row.replaces,
        "scores": dict(row.scores),
        "error": row.error,
    }
    return {key: value for key, value in tree.items() if value is not None and value != {}}
