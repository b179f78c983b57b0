"""A model of the hub: first the local cache, then a download. The checkpoint itself is opened as a local folder.

A revision that the cache holds completely is used as it is, without a network connection. The cache's place and offline
mode follow the environment as everywhere: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smelt.errors import InputError, SmeltError, StorageError
from smelt.storage import files, paths, strict_json
from smelt.storage.checkpoint import LARGE_LIMIT
from smelt.storage.layout import SINGLE
from smelt.storage.sources import local

ALLOW = (
    "*.safetensors",
    "*.json",
    "*.jsonl",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "README.md",
)
"""What a merge needs of a repository: weights, their index, configs, tokenizer, chat template, licence, card."""
IGNORE = ("*/*", "consolidated*.safetensors", "*.bin.index.json")
"""Left out: every subfolder (onnx/, original/, ...) and second copies of the weights."""
WEIGHTS = ("*.safetensors",)
"""What `resolve` leaves out as well when it is asked for no weights."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_OPTIONAL = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*")


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A snapshot of a repository on this machine: its folder, the commit that it is, whether its weights are there."""

    path: Path
    repo: str
    commit: str
    complete: bool = True


def resolve(repo: str, revision: str | None, *, download: bool = True, weights: bool = True) -> HubFolder:
    """Find a repository's snapshot in the hub cache, or download it.

    `revision` is a branch, a tag or a commit (default: main). With `download` false, or in offline mode, no connection
    is opened. With `weights` false only the small files are downloaded, and the snapshot may be incomplete: see
    `sources.remote`. Raises InputError with the way out: not found, gated, no such revision, offline, incomplete.
    """
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        raise InputError(f"{repo!r} is not the name of a model on the hub", fix="write it as org/name")
    wanted = revision or "main"
    if wanted.startswith("/") or "\\" in wanted or "\0" in wanted or ".." in wanted.split("/"):
        raise InputError(f"{wanted!r} is not a revision", where=[repo], fix="name a branch, a tag or a commit")
    cache = cache_dir()
    commit = _cached_commit(cache, repo, wanted)
    missing = ["the snapshot"] if commit is None else _missing(cache, repo, commit)
    if commit is not None and not missing:
        return HubFolder(_snapshot(cache, repo, commit), repo, commit)
    if not download or is_offline():
        lacking = "" if commit is None else f" (missing: {', '.join(missing[:8])})"
        why = "HF_HUB_OFFLINE is set" if is_offline() else "downloads are off"
        raise InputError(
            f"the model is not completely in the hub cache{lacking}, and {why}",
            where=[_label(repo, revision), f"cache {cache}"],
            fix="allow downloads, fetch the model beforehand with `hf download`, or give a folder (./name)",
        )
    path = _download(repo, revision, cache, weights=weights)
    return HubFolder(path, repo, path.name, complete=weights or not _missing(cache, repo, path.name))


def cache_dir() -> Path:
    """The hub cache's folder, from the environment as it is now."""
    environment = os.environ
    place = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    if not place:
        home = environment.get("HF_HOME") or os.path.join(
            environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
        )
        place = os.path.join(home, "hub")
    return Path(os.path.expandvars(place)).expanduser()


def is_offline() -> bool:
    """Whether the environment forbids the network (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in _TRUE


# --- the local cache ------------------------------------------------------------------------------------------------


def _repo_folder(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def _snapshot(cache: Path, repo: str, commit: str) -> Path:
    return _repo_folder(cache, repo) / "snapshots" / commit


def _cached_commit(cache: Path, repo: str, revision: str) -> str | None:
    """The commit that the cache knows for a revision, if it holds (part of) its snapshot."""
    commit = revision
    if not _COMMIT.fullmatch(revision):
        reference = _repo_folder(cache, repo) / "refs" / revision
        if files.kind(reference) != "file":
            return None
        commit = files.read_bytes(reference, limit=1000).decode("ascii", "replace").strip()
    if not _COMMIT.fullmatch(commit) or files.kind(_snapshot(cache, repo, commit)) != "folder":
        return None
    return commit


def _missing(cache: Path, repo: str, commit: str) -> list[str]:
    """The files that the cached snapshot lacks: config.json, weights, and what its cached listing names."""
    folder = _snapshot(cache, repo, commit)
    wanted = {"config.json", *_listed(_repo_folder(cache, repo) / "trees" / f"{commit}.json")}
    try:
        wanted.update(local.weight_files(folder, name=repo))
    except SmeltError:  # no weights, or an index that cannot be read: a download may mend it
        wanted.add(SINGLE)
    return sorted(name for name in wanted if files.kind(folder / name) != "file")


def _listed(tree: Path) -> Iterable[str]:
    """The files of a commit that a merge needs, from the listing that huggingface_hub keeps; none without one."""
    if files.kind(tree) != "file":
        return ()
    try:
        listing = strict_json.parse(files.read_bytes(tree, limit=LARGE_LIMIT), where=[str(tree)])
    except SmeltError:  # only a help; the hub rewrites it
        return ()
    entries = listing.get("files") if isinstance(listing, dict) else None
    names = entries if isinstance(entries, dict) else {}
    return [name for name in names if _is_needed(name) and paths.is_plain_name(name)]


def _is_needed(name: str) -> bool:
    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return matches(ALLOW) and not matches(IGNORE) and not matches(_OPTIONAL)


# --- the download ---------------------------------------------------------------------------------------------------


def _download(repo: str, revision: str | None, cache: Path, *, weights: bool) -> Path:
    """Let huggingface_hub fetch the snapshot."""
    import huggingface_hub

    try:
        with nullcontext() if weights and sys.stderr.isatty() else _no_bars():
            found = huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache,
                allow_patterns=list(ALLOW),
                ignore_patterns=[*IGNORE, *(() if weights else WEIGHTS)],
            )
    except Exception as error:  # the library's and its network layer's errors have no common base
        raise failure(error, repo, revision) from error
    return Path(found)


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars, unless the environment asks for them: for small files, and where nobody is looking."""
    from huggingface_hub import constants, utils

    settings: Any = utils  # its functions are public, though not exported to type checkers
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is False:
        yield
        return
    shown = not settings.are_progress_bars_disabled()
    settings.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            settings.enable_progress_bars()


def failure(error: Exception, repo: str, revision: str | None) -> SmeltError:
    """What huggingface_hub, or the network below it, raised about a repository, said for people."""
    from huggingface_hub import errors

    where = [_label(repo, revision)]
    if isinstance(error, errors.GatedRepoError):
        what = "the model is gated: its owner must grant access"
        fix = f"ask for access on https://huggingface.co/{repo}, then log in with `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = "there is no such model on the hub, or it is private"
        fix = f"check the name; log in with `hf auth login` if it is private; write ./{repo} for a folder"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, fix = f"the model has no revision {revision!r}", "name a branch, a tag or a commit of it"
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) or _is_network(error):
        what = "the hub cannot be reached, and the model is not completely in the cache"
        fix = "check the connection, or give a folder (./name)"
    elif isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        what = f"the download cannot be stored: {error.strerror}"
        return StorageError(what, where=[*where, str(cache_dir())])
    else:
        first = str(error).strip().splitlines() or [type(error).__name__]
        what = f"the download failed: {first[0][:300]}"
        fix = "try again; finished files are kept in the cache"
    return InputError(what, where=where, fix=fix)


def _is_network(error: Exception) -> bool:
    """Whether no answer came. By name: the network library below huggingface_hub changes from release to release."""
    return any(kind.__name__ in {"NetworkError", "TimeoutException", "ProxyError"} for kind in type(error).__mro__)


def _label(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision}" if revision else repo
