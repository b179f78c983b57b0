"""Space before it is written: on a disk reserved, in memory made by a thread that can be stopped."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from smelt.storage import reserving
from smelt.storage.reserving import Pages, lies_in_memory

MEMORY = Path("/dev/shm")


@pytest.fixture
def opened() -> Iterator[int]:
    """A file in memory."""
    path = MEMORY / f"smelt-test-{os.getpid()}-{threading.get_ident()}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    except OSError:
        pytest.skip("nothing can be written to /dev/shm")
    os.unlink(path)
    try:
        if not lies_in_memory(descriptor):
            pytest.skip("/dev/shm is no tmpfs")
        yield descriptor
    finally:
        os.close(descriptor)


def made(descriptor: int) -> int:
    """Bytes of pages that are there."""
    return os.fstat(descriptor).st_blocks * 512


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "smelt-pages"]


def test_pages_are_made_and_what_was_written_stays(opened: int) -> None:
    size = 3 * reserving._STEP + 5000
    os.ftruncate(opened, size)
    os.pwrite(opened, b"there", reserving._STEP + 1)
    pages = Pages()
    pages.start([(opened, size)])
    assert pages._thread is not None
    pages._thread.join()
    assert made(opened) >= size
    assert os.fstat(opened).st_size == size
    assert os.pread(opened, 7, reserving._STEP) == b"\0there\0"
    pages.stop()
    assert threads() == []


def test_it_stops_when_it_is_told(opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `stop` no file is touched: its descriptor may be closed, and given to another."""
    reached, go_on = threading.Event(), threading.Event()
    made_by = os.posix_fallocate

    def slowly(*words: int) -> None:
        reached.set()
        go_on.wait()
        made_by(*words)

    monkeypatch.setattr(os, "posix_fallocate", slowly)
    size = 100 * reserving._STEP
    os.ftruncate(opened, size)
    pages = Pages()
    pages.start([(opened, size)])
    reached.wait()
    stopping = threading.Thread(target=pages.stop)
    stopping.start()
    while not pages._stopped:
        pass
    go_on.set()
    stopping.join()
    assert threads() == []
    assert made(opened) <= reserving._STEP


def test_no_pages_are_made_on_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with open(path, "w+b") as file:
        if lies_in_memory(file.fileno()):
            pytest.skip("temporary files lie in memory")
        pages = Pages()
        pages.start([(file.fileno(), 1 << 20)])
        assert pages._thread is None
        pages.stop()


def test_where_there_is_no_room_the_writer_is_told(opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    os.ftruncate(opened, 1 << 20)
    pages = Pages()
    pages.start([(opened, 1 << 20)])
    pages.stop()
    assert made(opened) == 0
