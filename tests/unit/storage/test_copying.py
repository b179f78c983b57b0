"""Bytes from file to file: within the system where it can, by reading and writing where it cannot, never wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smelt.dtypes import BY_NAME
from smelt.errors import InputError, StorageError
from smelt.storage import copying, files
from smelt.storage.layout import OutputTensor, layout
from smelt.storage.sources.local import open_folder
from smelt.storage.writer import Build

DATA = np.random.default_rng(5).integers(0, 256, size=50_000, dtype=np.uint8).tobytes()
WAYS = [(0, 0, 50_000), (1, 1, 49_999), (5, 4101, 40_000), (4096, 8192, 8192), (0, 1, 9000), (7, 4103, 10), (3, 9, 0)]
"""(start, at, size): blocks that lie alike in both files, blocks that do not, less than a block, nothing."""

needs_system = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the system has no copy_file_range")


def copied(folder: Path, start: int, at: int, size: int) -> bytes:
    """What lies in a file of 60 000 zeros after `size` bytes were copied into it; the rest must be as it was."""
    (folder / "source").write_bytes(DATA)
    (folder / "target").unlink(missing_ok=True)
    with files.open_read(folder / "source") as source, files.create(folder / "target", 60_000) as target:
        copying.copy_range(source, start, target, at, size=size)
    found = (folder / "target").read_bytes()
    assert len(found) == 60_000
    assert not any(found[:at])
    assert not any(found[at + size :])
    return found[at : at + size]


@pytest.mark.parametrize(("start", "at", "size"), WAYS)
def test_the_bytes_arrive(tmp_path: Path, portable: bool, start: int, at: int, size: int) -> None:
    assert copied(tmp_path, start, at, size) == DATA[start : start + size]


@needs_system
@pytest.mark.parametrize("after", [0, 1], ids=["at once", "after some"])
@pytest.mark.parametrize("number", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM"])
def test_where_the_system_refuses_bytes_are_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, after: int
) -> None:
    calls = 0

    def refuse(source: int, target: int, size: int, start: int, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(getattr(errno, number), "refused")
        return os.copy_file_range(source, target, min(size, 1000), start, at)

    monkeypatch.setattr(copying, "_copy_some", refuse)
    assert copied(tmp_path, 3, 5, 40_000) == DATA[3:40_003]
    assert calls == after + 1


@needs_system
def test_short_copies_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = copying._copy_some
    monkeypatch.setattr(copying, "_copy_some", lambda s, t, size, start, at: whole(s, t, min(size, 777), start, at))
    for start, at, size in WAYS:
        assert copied(tmp_path, start, at, size) == DATA[start : start + size]


@needs_system
def test_blocks_that_lie_alike_are_asked_for_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    whole = copying._copy_some

    def note(source: int, target: int, size: int, start: int, at: int) -> int:
        asked.append((start, at, size))
        return whole(source, target, size, start, at)

    monkeypatch.setattr(copying, "_copy_some", note)
    assert copied(tmp_path, 5, 4101, 40_000) == DATA[5:40_005]
    assert asked == [(5, 4101, 4091), (4096, 8192, 32_768), (36_864, 40_960, 3141)]
    asked.clear()
    assert copied(tmp_path, 4096, 1, 9000) == DATA[4096:13_096]
    assert asked == [(4096, 1, 9000)]


@needs_system
def test_another_file_system(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one file system")
    source = elsewhere / f"smelt-test-{os.getpid()}"
    source.write_bytes(DATA)
    try:
        with files.open_read(source) as old, files.create(tmp_path / "copy", old.size) as new:
            copying.copy_range(old, 0, new, 0, size=old.size)
    finally:
        source.unlink()
    assert (tmp_path / "copy").read_bytes() == DATA


def test_a_source_that_ends_early(tmp_path: Path, portable: bool) -> None:
    (tmp_path / "source").write_bytes(DATA)
    with files.open_read(tmp_path / "source") as source, files.create(tmp_path / "target", 60_000) as target:
        os.truncate(tmp_path / "source", 45_000)
        with pytest.raises(InputError, match="cut off"):
            copying.copy_range(source, 0, target, 0, size=50_000)


@needs_system
def test_errors_that_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, fix in ((errno.EIO, None), (errno.ENOSPC, "free some space, or choose another disk")):

        def fail(*_: Any, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(copying, "_copy_some", fail)
        with pytest.raises(StorageError, match="cannot copy") as caught:
            copied(tmp_path, 0, 0, 50_000)
        assert caught.value.where == (f"{tmp_path / 'source'} -> {tmp_path / 'target'}",)
        assert caught.value.fix == fix


def test_outside_the_target(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(DATA)
    with files.open_read(tmp_path / "source") as source, files.create(tmp_path / "target", 10) as target:
        for at, size in ((-1, 2), (0, 11), (10, 1)):
            with pytest.raises(ValueError, match="outside"):
                copying.copy_range(source, 0, target, at, size=size)


def test_a_build_takes_parts_of_tensors(tmp_path: Path, portable: bool, encoder: Any) -> None:
    encoder.model(tmp_path / "model", {"model.safetensors": {"a": [9], "b": [100, 7]}}, index=False)
    shape = OutputTensor("new", BY_NAME["uint8"], (700,))
    with (
        open_folder(tmp_path / "model", name="m") as model,
        Build.start(tmp_path / "out", layout([shape], shard_bytes=1 << 20), overwrite=False) as build,
    ):
        held = model.tensors["b"]
        whole = bytearray(700)
        model.read_into(held, 0, 700, whole)
        build.take("new", 100, 700, source=model.file_of(held), offset=held.offset + 100)
        with pytest.raises(ValueError, match="not written to their end"):
            build.commit()
        for start, stop in ((0, 701), (-1, 3)):
            with pytest.raises(ValueError, match="outside"):
                build.take("new", start, stop, source=model.file_of(held), offset=held.offset)
        build.take("new", 0, 100, source=model.file_of(held), offset=held.offset)
        build.commit()
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[-700:] == whole
