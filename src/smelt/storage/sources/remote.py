"""A model of the hub whose weights stay there: what its headers say, fetched by range requests.

It is enough for a plan. The small files lie in the hub cache as after any download; the headers are checked as strictly
as those of a local folder, and by the same rules.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from smelt.errors import InputError, SmeltError
from smelt.specs import TensorSpec
from smelt.storage import paths
from smelt.storage.checkpoint import Checkpoint, FileInfo
from smelt.storage.files import Buffer, flat
from smelt.storage.layout import INDEX
from smelt.storage.sources import hub, local, shards
from smelt.storage.sources.hub import HubFolder
from smelt.storage.sources.shards import Part

FIRST = 8192
"""Bytes that the first request for a weight file asks for: the whole header of most shards."""
_CONNECTIONS = 8
_RETRIES = 3


class RemoteCheckpoint:
    """A model of the hub by its headers and its small files; its tensors cannot be read."""

    def __init__(self, name: str, folder: HubFolder, parts: Sequence[Part]) -> None:
        tensors, metadata = shards.merged(parts)
        infos = tuple(part.info for part in parts)
        self.name = name
        self.repo = folder.repo
        self.commit = folder.commit
        self.root: Path | None = folder.path
        self.tensors = tensors
        self.files = infos
        self.metadata = metadata
        self._local = Checkpoint(name, folder.path, tensors=tensors, weight_files=infos, metadata=metadata)

    def read_into(self, spec: TensorSpec, start: int, stop: int, buffer: Buffer) -> None:
        """Raises InputError: the weights were not downloaded."""
        raise InputError(
            "the weights of the model were not downloaded, only their headers",
            where=[f"{self.name}: {spec.file}", f"{self.repo}@{self.commit}", f"tensor {spec}"],
            fix="fetch the model with `hf download`, or merge it, which does so",
        )

    def bytes(self, name: str) -> builtins.bytes | None:
        """A small file of the repository, or None. Raises InputError when it is too large."""
        return self._local.bytes(name)

    def text(self, name: str) -> str | None:
        """A UTF-8 file without its byte-order mark, or None. Raises InputError if it is not that."""
        return self._local.text(name)

    def json(self, name: str) -> dict[str, Any] | None:
        """A strict JSON object, or None. Raises InputError if it is not that."""
        return self._local.json(name)

    def other_files(self) -> list[str]:
        """The names of the small files that a merge needs, sorted."""
        return self._local.other_files()

    def changed(self) -> list[str]:
        """Nothing: a commit never changes."""
        return []

    def close(self) -> None:
        """Let go of what is open."""
        self._local.close()

    def __enter__(self) -> RemoteCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: object, _t: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteCheckpoint({self.name!r}, {len(self.tensors)} tensors in {len(self.files)} files)"


def open_remote(folder: HubFolder, *, name: str) -> RemoteCheckpoint:
    """Open a model of the hub by its headers; `name` is its label in messages.

    `folder` is its snapshot in the cache with the small files (`hub.resolve` with `weights` false). Raises InputError
    (or ManyProblems of them) when the hub cannot be reached, or when files are missing or contradict one another.
    """
    listing = _listing(folder)
    names = sorted(listing)
    index = local.read_index(folder.path, name=name) if INDEX in listing else None
    place = f"{folder.repo}@{folder.commit} on the hub"
    wanted = shards.weight_names(names, index, name=name, place=place)
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        under_way = {file: pool.submit(_read_part, folder, file, listing.get(file), name) for file in wanted}
        try:
            parts = shards.gather(names, index, name=name, place=place, read=lambda file: under_way[file].result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return RemoteCheckpoint(name, folder, parts)


# --- what the hub tells ---------------------------------------------------------------------------------------------


def _listing(folder: HubFolder) -> dict[str, tuple[int, str | None]]:
    """The files at the top of the repository: name -> size in bytes, and sha256 where the hub knows it."""
    from huggingface_hub import HfApi, constants

    try:
        found = HfApi().model_info(
            folder.repo, revision=folder.commit, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:  # the library's and its network layer's errors have no common base
        raise hub.failure(error, folder.repo, folder.commit) from error
    listing: dict[str, tuple[int, str | None]] = {}
    for entry in found.siblings or ():
        size = entry.size if entry.lfs is None else entry.lfs.size
        if paths.is_plain_name(entry.rfilename) and isinstance(size, int):
            listing[entry.rfilename] = size, None if entry.lfs is None else entry.lfs.sha256
    return listing


def _read_part(folder: HubFolder, file: str, known: tuple[int, str | None] | None, name: str) -> Part:
    """Check the header of one weight file. Raises InputError naming model and file."""
    label = f"{name}: {file}"
    if known is None:
        raise shards.missing(label)
    size, sha256 = known
    opened = _RangeFile(folder, file, size=size, label=label)
    checked = shards.read_header(opened, file, label=label)
    return Part(FileInfo(file, size, checked.digest, folder.path / file, (size, 0, 0), sha256), checked)


class _RangeFile:
    """A file on the hub, read by byte ranges from its start on; what was fetched is kept."""

    def __init__(self, folder: HubFolder, file: str, *, size: int, label: str) -> None:
        from huggingface_hub import hf_hub_url

        self.size = size
        self._folder = folder
        self._label = label
        self._url = hf_hub_url(folder.repo, file, revision=folder.commit)
        self._known = bytearray()
        self._extend(min(FIRST, size))

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill the whole `buffer` from byte `offset`. Raises InputError when the hub does not send these bytes."""
        view = flat(buffer)
        self._extend(offset + len(view))
        view[:] = self._known[offset : offset + len(view)]

    def _extend(self, stop: int) -> None:
        start = len(self._known)
        if start < stop:
            self._known += self._fetch(start, stop)

    def _fetch(self, start: int, stop: int) -> bytearray:
        """Bytes [start, stop), and never more are read, whatever the hub sends."""
        from huggingface_hub import constants, utils

        network: Any = utils  # its functions are public, though not exported to type checkers
        headers = {**network.build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        data = bytearray()
        try:
            with network.http_stream_backoff(
                "GET", self._url, headers=headers, timeout=timeout, max_retries=_RETRIES
            ) as response:
                network.hf_raise_for_status(response)
                told = response.headers.get("Content-Range")
                if response.status_code != 206 or told != f"bytes {start}-{stop - 1}/{self.size}":
                    raise self._refusal(start, stop, told or f"the whole file (status {response.status_code})")
                try:
                    for chunk in response.iter_raw():
                        data += chunk
                        if len(data) > stop - start:
                            break
                except Exception as error:  # as ours, or the library would catch it, ask again and answer twice
                    raise hub.failure(error, self._folder.repo, self._folder.commit) from error
        except SmeltError:
            raise
        except Exception as error:  # the library's and its network layer's errors have no common base
            raise hub.failure(error, self._folder.repo, self._folder.commit) from error
        if len(data) != stop - start:
            raise self._refusal(start, stop, f"{'more' if len(data) > stop - start else len(data)} bytes")
        return data

    def _refusal(self, start: int, stop: int, got: str) -> InputError:
        return InputError(
            "the hub does not send the part of the file that was asked for",
            where=[self._label, f"asked for bytes {start}-{stop - 1}/{self.size}, got {got}"],
            fix="try again, or fetch the model with `hf download`",
        )
