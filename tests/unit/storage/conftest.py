"""What the storage tests share: both ways to read and write, small safetensors files, a system that fails."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smelt.storage import files


@pytest.fixture(params=[False, True], ids=["positional", "portable"])
def portable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run the test with positional calls and again with their portable stand-ins."""
    monkeypatch.setattr(files, "PORTABLE", request.param)
    return bool(request.param)


class Encoder:
    """Safetensors files byte by byte, sound or not."""

    @staticmethod
    def file(header: object, data: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    @staticmethod
    def header(tensors: dict[str, list[int]], dtype: str = "U8") -> tuple[dict[str, Any], bytes]:
        """Entries and data for uint8 tensors of the given shapes, filled with a counter."""
        entries: dict[str, Any] = {}
        position = 0
        for name, shape in tensors.items():
            size = 1
            for length in shape:
                size *= length
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position += size
        return entries, bytes(number % 251 for number in range(position))

    def write(self, path: Path, tensors: dict[str, list[int]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.file(*self.header(tensors)))
        return path

    def model(self, folder: Path, shards: dict[str, dict[str, list[int]]], *, index: bool = True) -> Path:
        """A folder of shards {file: {tensor: shape}} with config and index."""
        for file, tensors in shards.items():
            self.write(folder / file, tensors)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        if index:
            weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (folder / "model.safetensors.index.json").write_text(text)
        return folder


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


class Faults:
    """Replaces `files.system`: counts its calls, and makes call number `at` fail with `error`."""

    def __init__(self) -> None:
        self.at = -1
        self.error: BaseException = OSError(5, "Input/output error")
        self.calls: list[str] = []
        self.real = files.system

    def __call__(self, what: str, path: Any, call: Callable[..., Any], *args: Any, needed: int = 0) -> Any:
        self.calls.append(what)
        if len(self.calls) - 1 == self.at:
            if what == "close":  # a close that fails has closed all the same
                self.real(what, path, call, *args)
            return self.real(what, path, self._fail, needed=needed)
        return self.real(what, path, call, *args, needed=needed)

    def _fail(self) -> None:
        raise self.error


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    double = Faults()
    monkeypatch.setattr(files, "system", double)
    return double


class Killed(BaseException):
    """The process died: nothing after this touches the disk."""


class Kill:
    """Lets the process "die" at system call number `at`, before or after it takes place; use as a context.

    From then on every call of the handlers that still run is refused, as if they did not run. On leaving, what was
    open is closed, as the system does for a dead process; its locks go with it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._system, self._unlink = files.system, os.unlink
        self._held: list[int] = []
        self.at, self.after, self.dead, self._count = -1, False, False, 0

    def __call__(self, what: str, path: Any, call: Callable[..., Any], *args: Any, needed: int = 0) -> Any:
        if self.dead:
            raise Killed
        self._count += 1
        self.dead = self._count - 1 == self.at
        if self.dead and not self.after:
            raise Killed
        result = self._system(what, path, call, *args)
        if what == "open":
            self._held.append(result)
        if self.dead:
            raise Killed
        return result

    def _remove(self, path: Any, **settings: Any) -> None:
        if self.dead:
            raise Killed
        self._unlink(path, **settings)

    def __enter__(self) -> Kill:
        self._monkeypatch.setattr(files, "system", self)
        self._monkeypatch.setattr(os, "unlink", self._remove)
        self._count, self.dead = 0, False
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._monkeypatch.setattr(files, "system", self._system)
        self._monkeypatch.setattr(os, "unlink", self._unlink)
        while self.dead and self._held:
            with contextlib.suppress(OSError):
                os.close(self._held.pop())
        self._held.clear()
        return kind is Killed


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Kill:
    return Kill(monkeypatch)
