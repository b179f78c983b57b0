"""The lock on an output: one holder at a time, which leaves nothing and dies with its process."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smelt.errors import StorageError
from smelt.storage.locking import lock_folder


def _hold(folder: str, ready: multiprocessing.synchronize.Event) -> None:
    lock_folder(folder)
    ready.set()
    threading.Event().wait()


def test_a_lock_is_exclusive_and_leaves_nothing(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path / "out")
    with pytest.raises(StorageError, match="another smelt run is writing"):
        lock_folder(tmp_path / "out")
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock_folder(tmp_path / "out").release()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "out"), ready))
    process.start()
    try:
        assert ready.wait(20)
        with pytest.raises(StorageError, match="another smelt run"):
            lock_folder(tmp_path / "out")
    finally:
        process.kill()
        process.join()
    assert (tmp_path / "out.lock").exists()
    lock_folder(tmp_path / "out").release()


def test_one_of_many_threads_gets_the_lock(tmp_path: Path) -> None:
    """Taking and releasing at full speed, two are never inside at once, though each release removes the file."""
    inside, worst = [0], [0]

    def work(_: int) -> int:
        entered = 0
        for _ in range(100):
            try:
                lock = lock_folder(tmp_path / "out")
            except StorageError:
                continue
            inside[0] += 1
            worst[0] = max(worst[0], inside[0])
            entered += 1
            inside[0] -= 1
            lock.release()
        return entered

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) > 0
    assert worst == [1]
