"""`storage.files`: whole reads and writes, refusals in plain words, locks; both positional and portable."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from smelt.errors import InputError, StorageError
from smelt.storage import files
from smelt.storage.locking import lock_folder

pytestmark = pytest.mark.usefixtures("portable")


# --- reading and writing --------------------------------------------------------------------------------------------


def test_write_then_read_at_any_place(tmp_path: Path) -> None:
    with files.create(tmp_path / "f", 10) as file:
        file.write_at(6, b"6789")
        file.write_at(0, np.arange(2, dtype="<u2"))
        back = bytearray(10)
        file.read_into(0, back)
        file.sync()
    assert back == b"\0\0\1\0\0\0006789"
    with files.open_read(tmp_path / "f") as read:
        assert (read.size, read.path) == (10, tmp_path / "f")
        array = np.zeros((2, 2), np.uint16)
        read.read_into(1, array)
        read.read_into(10, bytearray())  # nothing, at the very end
        assert array.tobytes() == bytes(back[1:9])
        assert read.stamp() == files.stamp(tmp_path / "f")


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = files._write_some, files._read_some
    monkeypatch.setattr(files, "_write_some", lambda d, view, at, lock: write(d, view[:3], at, lock))
    monkeypatch.setattr(files, "_read_some", lambda d, view, at, lock: read(d, view[:2], at, lock))
    files.write_bytes(tmp_path / "f", b"twelve bytes")
    assert files.read_bytes(tmp_path / "f", limit=12) == b"twelve bytes"


def test_many_threads_share_a_file(tmp_path: Path) -> None:
    block, count = 1000, 200
    with files.create(tmp_path / "f", block * count) as file, ThreadPoolExecutor(8) as pool:

        def work(number: int) -> bool:
            mine = bytes([number]) * block
            file.write_at(number * block, mine)
            back = bytearray(block)
            file.read_into(number * block, back)
            return bytes(back) == mine

        assert all(pool.map(work, range(count)))


def test_writing_outside_the_size_is_refused(tmp_path: Path) -> None:
    with files.create(tmp_path / "f", 4) as file:
        for offset, data in ((-1, b"a"), (4, b"a"), (0, b"abcde")):
            with pytest.raises(ValueError, match="outside"):
                file.write_at(offset, data)
    assert (tmp_path / "f").read_bytes() == bytes(4)


def test_create_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"precious")
    with pytest.raises(StorageError, match="cannot open: File exists"):
        files.create(tmp_path / "f", 4)
    os.symlink(tmp_path / "elsewhere", tmp_path / "link")
    with pytest.raises(StorageError):
        files.create(tmp_path / "link", 4)
    assert (tmp_path / "f").read_bytes() == b"precious"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_umask_is_respected(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        files.create(tmp_path / "f", 1).close()
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == mode


def test_space_is_reserved(tmp_path: Path, portable: bool) -> None:
    files.create(tmp_path / "f", 1 << 20).close()
    found = (tmp_path / "f").stat()
    assert found.st_size == 1 << 20
    assert portable or found.st_blocks * 512 >= 1 << 20


def test_a_file_system_that_cannot_reserve_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    files.create(tmp_path / "f", 1000).close()
    assert (tmp_path / "f").stat().st_size == 1000


def test_in_memory_no_space_is_reserved(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not lies_in_memory_by_the_system(memory):
        pytest.skip("no tmpfs at /dev/shm")
    path = memory / f"smelt-test-{os.getpid()}"
    try:
        files.create(path, 1 << 20).close()
        found = path.stat()
        assert (found.st_size, found.st_blocks) == (1 << 20, 0)
    finally:
        path.unlink(missing_ok=True)


def lies_in_memory_by_the_system(folder: Path) -> bool:
    """What the table of mounts says: reserving asks another way."""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(line.split()[1:3] == [str(folder), "tmpfs"] for line in mounts.splitlines())


def test_read_bytes_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert files.read_bytes(tmp_path / "f", limit=5) == b"12345"
    with pytest.raises(InputError, match="too large: 5 bytes, at most 4 bytes"):
        files.read_bytes(tmp_path / "f", limit=4)


def test_copy_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_COPY_CHUNK", 7)
    for size in (0, 6, 7, 8, 100):
        content = os.urandom(size)
        (tmp_path / "from").write_bytes(content)
        files.copy_file(tmp_path / "from", tmp_path / f"to{size}")
        assert (tmp_path / f"to{size}").read_bytes() == content


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    with files.open_read(tmp_path / "f") as file, pytest.raises(InputError, match="ends early") as caught:
        file.read_into(2, bytearray(4))
    assert caught.value.where == (str(tmp_path / "f"), "nothing is there at byte 5")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_only_regular_files_are_opened_and_nothing_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink(tmp_path / "pipe", tmp_path / "to-pipe")
    server = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(tmp_path)  # the path of a socket must be short
    try:
        server.bind("socket")
    finally:
        os.chdir(here)
    expected = {
        "pipe": "a pipe",
        "to-pipe": "a pipe",
        "folder": "a folder",
        "socket": "a socket",
        "loop": "no such file",
        "dangling": "no such file",
        "missing": "no such file",
        "x" * 300: "no such file",
    }
    with server:
        for name, message in expected.items():
            with pytest.raises(InputError, match=message):
                files.open_read(tmp_path / name)
    with pytest.raises(InputError, match="a device"):
        files.open_read("/dev/zero")


def test_no_space_says_how_much_was_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with files.create(tmp_path / "old", 2_000_000) as file:
        monkeypatch.setattr(files, "_write_some", full)
        with pytest.raises(StorageError, match=r"cannot write: no space .*\(1.5 MB needed\).*fix: free some"):
            file.write_at(0, bytes(1_500_000))
    monkeypatch.setattr(files, "_reserve", full)
    with pytest.raises(StorageError, match=r"cannot reserve space for: .*\(5 GB needed\)") as caught:
        files.create(tmp_path / "new", 5_000_000_000)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "new").exists()


def test_every_failing_call_becomes_a_storage_error_and_leaks_nothing(tmp_path: Path, faults) -> None:
    """Fail call 0, 1, 2, ... of one piece of work until it passes; descriptors are closed every time."""
    (tmp_path / "source").write_bytes(b"content")
    before = len(os.listdir("/proc/self/fd"))
    seen = []
    for faults.at in range(100):
        faults.calls.clear()
        folder = tmp_path / str(faults.at)
        try:
            files.make_folder(folder)
            files.copy_file(tmp_path / "source", folder / "copy")
            lock = lock_folder(folder)
            lock.release()
            files.sync_folder(folder)
            files.rename(folder / "copy", folder / "moved")
            assert files.list_folder(folder) == ["moved"]
            files.remove_tree(folder)
        except StorageError as error:
            seen.append((error.exit_code, files.code(error), len(error.where)))
        else:
            break
        finally:
            assert len(os.listdir("/proc/self/fd")) <= before
    assert faults.at == len(faults.calls) == len(seen) > 12
    assert set(seen) == {(4, 5, 1)}


def test_permission_has_a_fix() -> None:
    with pytest.raises(StorageError, match="fix: check the permissions"):
        files.system("open", "x", lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied")))


def test_more_files_than_the_soft_limit(tmp_path: Path) -> None:
    """Three models of many shards need more descriptors than the usual soft limit gives."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from smelt.storage import files
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 200))
        held = [files.create(Path(sys.argv[1]) / str(number), 1) for number in range(100)]
        print(len(held))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "100", done.stderr


# --- folders --------------------------------------------------------------------------------------------------------


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    files.make_folder(folder)
    assert files.is_empty_folder(folder)
    with pytest.raises(StorageError):
        files.make_folder(folder)
    for name in ("b", "a", "ä"):
        files.write_bytes(folder / name, b"")
    assert files.list_folder(folder) == ["a", "b", "ä"]
    assert not files.is_empty_folder(folder)
    with pytest.raises(StorageError):
        files.remove_folder(folder)
    files.sync_folder(folder)
    files.rename(folder, tmp_path / "moved")
    assert files.kind(folder) is None
    assert files.kind(tmp_path / "moved") == "folder"
    assert files.free_bytes(tmp_path) > 0


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink("f", tmp_path / "link")
    names = ["f", "link", ".", "pipe", "dangling", "missing", "f/below"]
    kinds = ["file", "file", "folder", "other", "link", None, None]
    assert [files.kind(tmp_path / name) for name in names] == kinds


def test_remove_tree_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "f").touch()
    (tmp_path / "gone" / "deep").mkdir(parents=True)
    os.symlink(tmp_path / "keep", tmp_path / "gone" / "deep" / "link")
    files.remove_tree(tmp_path / "gone")
    files.remove_tree(tmp_path / "gone")  # nothing there is no error
    assert [entry.name for entry in tmp_path.iterdir()] == ["keep"]
    assert (tmp_path / "keep" / "f").exists()
    os.symlink(tmp_path / "keep", tmp_path / "link")
    with pytest.raises(StorageError):
        files.remove_tree(tmp_path / "link")


def test_stamp_tells_changes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert files.stamp(path) is None
    path.write_bytes(b"1")
    first = files.stamp(path)
    os.utime(path, ns=(1, 1))
    second = files.stamp(path)
    path.write_bytes(b"22")
    assert len({first, second, files.stamp(path)}) == 3
