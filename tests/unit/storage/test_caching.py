"""What the system is told to fetch, to write and to let go."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.dtypes import F32
from smelt.storage import caching, files
from smelt.storage.caching import Ahead, Writeback, available_bytes
from smelt.storage.layout import OutputTensor, layout
from smelt.storage.writer import Build

DATA = bytes(range(256)) * 200
MIB = 1 << 20
hints = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no hints")


# --- reading ahead --------------------------------------------------------------------------------------------------


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of thousands of bytes."""
    for name, value in {"_WORTH_HINT": 100, "_AHEAD": 4000, "_FAR": 9000, "_LEAST": 1000}.items():
        monkeypatch.setattr(caching, name, value)


@hints
def test_what_lies_ahead_is_hinted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(caching, "fetch", lambda _, start, stop: told.append((start, stop)))
    (tmp_path / "f").write_bytes(DATA)
    with files.open_read(tmp_path / "f") as file:
        for offset in range(0, 50_000, 500):
            file.read_into(offset, bytearray(500))
        assert told[:2] == [(500, 4500), (4500, 5500)]
        assert told[-1][1] == len(DATA)
        assert all(before[1] == after[0] for before, after in pairwise(told))
        assert all(high - low >= 1000 for low, high in told[:-1])
        told.clear()
        for offset in (0, 49_000, 20_000):  # what was hinted at is not again
            file.read_into(offset, bytearray(1000))
        file.read_into(0, bytearray(50_000))
        file.read_into(0, bytearray(99))
    assert told == []


@hints
def test_a_hint_that_fails_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    calls = []

    def fail(*_: int) -> None:
        calls.append(1)
        raise OSError(errno.EIO, "no")

    for name in ("fetch", "let_go", "begin_writing"):
        monkeypatch.setattr(caching, name, fail)
    (tmp_path / "f").write_bytes(DATA)
    found = bytearray(1000)
    with files.open_read(tmp_path / "f") as file:
        file.read_into(0, found)
        file.let_go(0, 1000)
    with files.create(tmp_path / "g", 10) as new:
        new.begin_writing()
        new.let_go()
    assert (found, calls) == (DATA[:1000], [1] * 4)


def test_a_second_pass_moves_on_what_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a streamed file: in its first pass a part ahead, in the second what comes behind, and not without end."""
    small(monkeypatch)
    plain, streamed = Ahead(100_000), Ahead(100_000)
    streamed.streamed = True
    passes = []
    for _ in range(3):
        passes.append([(plain.behind(at, 500), streamed.behind(at, 500)) for at in range(0, 3000, 500)])
    assert passes[0][0] == ((500, 4500), (500, 4500))
    assert [one for one, _ in (*passes[1], *passes[2]) if one] == []
    ends = [two[1] for _, two in (*passes[0], *passes[1], *passes[2]) if two]
    assert ends == sorted(ends)
    assert passes[1][0][1] is not None
    assert 11_000 < ends[-1] <= 12_000  # so far behind 3000
    assert passes[2][-1][1] is None


@given(
    st.integers(1, 50_000),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 50_000), st.integers(0, 5000)), max_size=30),
)
def test_only_what_is_there_is_fetched_and_once(size: int, streamed: bool, reads: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        ahead = Ahead(size)
        ahead.streamed = streamed
        told = 0
        for offset, length in reads:
            span = ahead.behind(min(offset, size), min(length, size - min(offset, size)))
            if span is not None:
                assert told <= span[0] < span[1] <= size
                told = span[1]


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_told_in_bytes() -> None:
    found = available_bytes()
    assert found is not None
    assert 1 << 24 < found < 1 << 50


def test_a_container_has_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "_LIMITS", (tmp_path / "none", tmp_path / "limit"))
    (tmp_path / "limit").write_text("1048576\n")
    assert available_bytes() == MIB
    (tmp_path / "limit").write_text("max\n")
    assert (available_bytes() or 0) > MIB


# --- writing --------------------------------------------------------------------------------------------------------


def test_writeback_calls_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "_PAUSE", 0.001)
    called = [threading.Event(), threading.Event()]
    counts = [0, 0]

    def call(number: int) -> None:
        counts[number] += 1
        if counts[number] == 2:
            called[number].set()

    writeback = Writeback()
    writeback.start([lambda: call(0), lambda: call(1)])
    assert called[0].wait(20)
    assert called[1].wait(20)
    writeback.stop()
    before = list(counts)
    time.sleep(0.02)
    assert counts == before
    Writeback().stop()  # one that never began


def resident(path: Path) -> float:
    """The share of a file's pages that the system holds in memory."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        view = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        array = np.frombuffer(view, np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        pointers = [ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)]
        assert ctypes.CDLL(None).mincore(*pointers) == 0
        return float((pages & 1).mean())


def forgets(folder: Path) -> bool:
    """Whether the file system of a folder lets files go: one in memory cannot."""
    path = folder / "probe"
    path.write_bytes(bytes(4 * MIB))
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    share = resident(path)
    path.unlink()
    return share < 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what it holds in memory")
@pytest.mark.parametrize("stream", [False, True])
def test_an_output_that_streams_is_not_kept_in_memory(tmp_path: Path, stream: bool) -> None:
    if not forgets(tmp_path):
        pytest.skip("a file system in memory")
    shards = layout([OutputTensor("w", F32, (4 * MIB,))], shard_bytes=1 << 30)
    with Build.start(tmp_path / "out", shards, overwrite=False, stream=stream) as build:
        build.write("w", 0, bytes(16 * MIB))
        build.commit()
    share = resident(tmp_path / "out" / "model.safetensors")
    assert share < 0.1 if stream else share > 0.9
