"""The journal: what a reader trusts, what it ignores, and when a line may be written."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from smelt import dtypes
from smelt.errors import InputError, NumericError, SmeltError, StorageError
from smelt.storage import digests, files, journal
from smelt.storage.journal import Finished, Journal
from smelt.storage.leftovers import Leftover, leftovers, remove_leftover
from smelt.storage.writer import Build, OutputTensor, layout

HEAD = {"smelt": "1", "seed": 0, "allow": ["nonfinite"], "input": {"a/x": [1, 2], "b/x": [3, 4]}}
TENSORS = [OutputTensor(f"t{i}", dtypes.BY_CODE["U8"], (100,)) for i in range(6)]
SHARDS = layout(TENSORS, shard_bytes=200)


def content(name: str) -> bytes:
    return bytes((len(name) + int(name[1:]) * 7 + i) % 251 for i in range(100))


def digest(name: str) -> str:
    return digests.joined(digests.of_blocks(memoryview(content(name))))


def finish(build: Build, *names: str) -> None:
    for name in names:
        build.write(name, 0, content(name))
        build.finished(Finished(name, digest(name), inherited=2))


def start(out: Path, *, resume: bool = False, head: dict[str, Any] | None = None, overwrite: bool = False) -> Build:
    return Build.start(out, SHARDS, overwrite=overwrite, head=HEAD if head is None else head, resume=resume)


def die(build: Build, *, flush: bool = True) -> None:
    """End as SIGKILL ends: files and lock are let go, nothing is removed."""
    build._close(flush=flush)
    build._lock.release()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def whole(out: Path) -> bool:
    from smelt.storage.sources.local import open_folder

    with open_folder(out, name="out") as model:
        for name, spec in model.tensors.items():
            buffer = bytearray(spec.nbytes)
            model.read_into(spec, 0, spec.nbytes, buffer)
            assert bytes(buffer) == content(name)
        return model.tensors.keys() == {tensor.name for tensor in TENSORS}


# --- lines ----------------------------------------------------------------------------------------------------------


def written(path: Path, *names: str) -> bytes:
    kept = Journal.create(path, HEAD, lambda _: None)
    for name in names:
        kept.add(Finished(name, "0" * 32, created=1), file="x", nbytes=1)
    kept.close(flush=True)
    return path.read_bytes()


def test_it_reads_what_it_wrote(tmp_path: Path) -> None:
    size = len(written(tmp_path / "j", "a", "ünï ☃", "a"))
    found = journal.read(tmp_path / "j")
    assert found is not None
    assert (found.head, found.size) == (HEAD, size)
    assert found.finished == {name: Finished(name, "0" * 32, 0, 1) for name in ("a", "ünï ☃")}


def test_torn_at_every_byte(tmp_path: Path) -> None:
    """A crash cuts it anywhere: whole lines count, the rest does not."""
    data = written(tmp_path / "j", "a", "b")
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data) + 1):
        (tmp_path / "j").write_bytes(data[:size])
        found = journal.read(tmp_path / "j")
        lines = sum(end <= size for end in ends)
        if lines == 0:
            assert found is None
        else:
            assert found is not None
            assert (list(found.finished), found.size) == (["a", "b"][: lines - 1], ends[lines - 1])


def test_a_flipped_bit_ends_it(tmp_path: Path) -> None:
    data = written(tmp_path / "j", "a", "b")
    second = data.index(b"\n") + 1
    for place in range(second, data.index(b"\n", second)):
        (tmp_path / "j").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        found = journal.read(tmp_path / "j")
        assert found is not None
        assert not found.finished


@pytest.mark.parametrize("junk", [b"", b"\0" * 4096, b"nonsense\n", b"\xff\xfe\n\n\n"])
def test_what_is_no_journal(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "j").write_bytes(junk)
    assert journal.read(tmp_path / "j") is None
    assert journal.read(tmp_path / "absent") is None
    assert journal.read(tmp_path) is None
    (tmp_path / "link").symlink_to("j")
    assert journal.read(tmp_path / "link") is None


def test_it_goes_on_behind_the_last_sound_line(tmp_path: Path) -> None:
    data = written(tmp_path / "j", "a")
    (tmp_path / "j").write_bytes(data + b"torn")
    found = journal.read(tmp_path / "j")
    assert found is not None
    kept = Journal.go_on(tmp_path / "j", found, lambda _: None)
    kept.add(Finished("b", "1" * 32), file="x", nbytes=1)
    kept.close(flush=True)
    assert (tmp_path / "j").read_bytes().startswith(data)
    again = journal.read(tmp_path / "j")
    assert again is not None
    assert list(again.finished) == ["a", "b"]


def test_differences_in_words() -> None:
    other = {"smelt": "2", "seed": 0, "allow": [], "input": {"a/x": [1, 3], "c/x": []}, "plan": "f" * 64}
    assert journal.differences(HEAD, HEAD) == []
    assert journal.differences(HEAD, other) == [
        "smelt: 1 then, 2 now",
        "allow: nonfinite then, nothing now",
        "input: a/x was changed",
        "input: c/x is new",
        "input: b/x is gone",
        f"plan: None then, {'f' * 12}... now",
    ]


# --- when a line is written -----------------------------------------------------------------------------------------


def test_data_are_synced_before_their_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line that the journal gets speaks of weight files synced after the tensor was written."""
    monkeypatch.setattr(journal, "SYNC_BYTES", 150)
    events: list[tuple[str, str]] = []
    real = files.system

    def watched(what: str, path: Any, call: Any, *args: Any, needed: int = 0) -> Any:
        result = real(what, path, call, *args, needed=needed)
        if what == "write" and str(path).endswith(".journal"):
            events.append(("line", bytes(args[1]).decode()))
        elif what == "write":
            events.extend(("data", tensor.name) for tensor in TENSORS if bytes(args[1]) == content(tensor.name))
        elif what in ("sync", "sync folder"):
            events.append((what, Path(path).name))
        return result

    monkeypatch.setattr(files, "system", watched)
    build = start(tmp_path / "out")
    for tensor in TENSORS:
        finish(build, tensor.name)
        time.sleep(0.02)
    die(build)
    lines = [i for i, (what, _) in enumerate(events) if what == "line"]
    assert len(lines) >= 3
    spoken = set()
    for i in lines[1:]:  # the first is the head
        for name in (tensor.name for tensor in TENSORS if f'"{tensor.name}"' in events[i][1]):
            spoken.add(name)
            assert ("sync", SHARDS.spec(name).file) in events[events.index(("data", name)) : i], name
        assert events[i + 1] == ("sync", ".out.smelt-build.journal")
    assert spoken == {tensor.name for tensor in TENSORS}
    assert ("sync folder", ".out.smelt-build") in events[: lines[1]]
    assert ("sync folder", tmp_path.name) in events[: lines[1]]


def test_small_and_short_merges_pay_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(files.WriteFile, "sync", lambda file: synced.append(file.path.name))
    build = start(tmp_path / "out")
    finish(build, *(tensor.name for tensor in TENSORS))
    assert synced == []
    build.abandon()
    assert names_in(tmp_path) == []


def test_the_time_makes_it_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_SECONDS", 0.05)
    build = start(tmp_path / "out")
    finish(build, "t0")
    deadline = time.monotonic() + 10
    path = tmp_path / ".out.smelt-build.journal"
    while b"t0" not in path.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    build.abandon()


def test_what_the_thread_fails_with_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_BYTES", 0)
    called = threading.Event()

    def sync(_: Iterable[str]) -> None:
        called.set()
        raise StorageError("the disk is gone")

    kept = Journal.create(tmp_path / "j", HEAD, sync)
    kept.add(Finished("a", ""), file="x", nbytes=1)
    assert called.wait(10)
    assert kept._thread is not None
    kept._thread.join(10)
    with pytest.raises(StorageError, match="the disk is gone"):
        kept.add(Finished("b", ""), file="x", nbytes=1)
    with pytest.raises(StorageError, match="the disk is gone"):
        kept.close(flush=True)
    assert b'"a"' not in (tmp_path / "j").read_bytes()


# --- builds that go on ----------------------------------------------------------------------------------------------


def test_a_build_goes_on(tmp_path: Path) -> None:
    build = start(tmp_path / "out")
    finish(build, "t0", "t1", "t3")
    build.write("t2", 0, content("t2")[:50])
    build.put("config.json", b"{}")
    die(build)
    with start(tmp_path / "out", resume=True) as build:
        assert build.resumed == tuple(Finished(name, digest(name), 2) for name in ("t0", "t1", "t3"))
        assert not build.discarded
        finish(build, "t2", "t4", "t5")
        build.put("config.json", b"{}")
        build.commit()
    assert whole(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]


def test_a_build_that_was_cut_off_in_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its header lengths and small files in place: it is not read as a checkpoint while it goes on."""
    build = start(tmp_path / "out")
    finish(build, *(tensor.name for tensor in TENSORS))
    build.put("config.json", b"{}")
    build._journal.close(flush=True)  # type: ignore[union-attr]
    monkeypatch.setattr(files, "rename", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build.commit()
    monkeypatch.undo()
    die(build)
    shards = [shard.file for shard in SHARDS.shards]
    assert (tmp_path / ".out.smelt-build" / shards[0]).read_bytes()[:8] != bytes(8)
    with start(tmp_path / "out", resume=True) as build:
        assert len(build.resumed) == len(TENSORS)
        assert names_in(build.folder) == shards
        assert all(path.read_bytes()[:8] == bytes(8) for path in build.folder.iterdir())
        build.commit()
    assert whole(tmp_path / "out")


def test_what_does_not_hash_is_done_again(tmp_path: Path) -> None:
    """A power failure lost the data but not the line: it is not trusted."""
    build = start(tmp_path / "out")
    finish(build, "t0", "t1")
    die(build)
    spec = SHARDS.spec("t0")
    with open(tmp_path / ".out.smelt-build" / spec.file, "r+b") as file:
        file.seek(spec.offset + 99)
        file.write(b"\xff")
    with start(tmp_path / "out", resume=True) as build:
        assert [tensor.name for tensor in build.resumed] == ["t1"]
        with pytest.raises(ValueError, match="5 tensors were not written"):
            build.commit()
        finish(build, "t0", "t2", "t3", "t4", "t5")
        build.commit()
    assert whole(tmp_path / "out")


@pytest.mark.parametrize("spoil", ["remove", "cut", "link", "folder"])
def test_weight_files_that_are_not_as_they_were(tmp_path: Path, spoil: str) -> None:
    """Then there is nothing to trust, and the build begins anew."""
    build = start(tmp_path / "out")
    finish(build, "t0")
    die(build)
    file = tmp_path / ".out.smelt-build" / SHARDS.shards[1].file
    data = file.read_bytes()
    file.unlink()
    if spoil == "cut":
        file.write_bytes(data[:-1])
    elif spoil == "link":
        (tmp_path / "precious").write_bytes(data)
        file.symlink_to(tmp_path / "precious")
    elif spoil == "folder":
        file.mkdir()
    if spoil == "link":  # followed by nobody
        with pytest.raises(StorageError, match="cannot open"):
            start(tmp_path / "out", resume=True)
        assert (tmp_path / "precious").read_bytes() == data
        return
    with start(tmp_path / "out", resume=True) as build:
        assert build.resumed == ()
        assert build.discarded
        finish(build, *(tensor.name for tensor in TENSORS))
        build.commit()
    assert whole(tmp_path / "out")


@pytest.mark.parametrize("change", [{"smelt": "2"}, {"seed": 1}, {"input": {"a/x": [1, 2]}}, {"new": 1}])
def test_another_merge_is_refused_and_left_alone(tmp_path: Path, change: dict[str, Any]) -> None:
    build = start(tmp_path / "out")
    finish(build, "t0")
    die(build)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StorageError, match=r"cannot resume.*another merge") as caught:
        start(tmp_path / "out", resume=True, head={**HEAD, **change})
    assert any(line.startswith(f"{next(iter(change))}: ") for line in caught.value.where)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    build = start(tmp_path / "out")
    finish(build, "t0")
    die(build)
    with start(tmp_path / "out") as build:
        assert build.discarded
        assert build.resumed == ()
        assert journal.read(tmp_path / ".out.smelt-build.journal").finished == {}  # type: ignore[union-attr]
    assert names_in(tmp_path) == []


def test_with_nothing_there_it_begins(tmp_path: Path) -> None:
    with start(tmp_path / "out", resume=True) as build:
        assert (build.resumed, build.discarded) == ((), False)
    assert names_in(tmp_path) == []


def stopped(out: Path, error: BaseException, *names: str) -> None:
    """A build that is to go on writes some tensors and ends with `error`."""
    with contextlib.suppress(type(error)), start(out, resume=True) as build:
        finish(build, *names)
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("no space"), RuntimeError("?")], ids=repr)
def test_what_is_kept_when_it_is_stopped(tmp_path: Path, error: BaseException) -> None:
    stopped(tmp_path / "out", error, "t0", "t4")
    assert error.__notes__ == [
        "2 of 6 tensors are finished and kept: run again with --resume to go on, "
        f"or remove them with `smelt clean {tmp_path}`"
    ]
    assert names_in(tmp_path) == [".out.smelt-build", ".out.smelt-build.journal"]
    with start(tmp_path / "out", resume=True) as build:
        assert [tensor.name for tensor in build.resumed] == ["t0", "t4"]


@pytest.mark.parametrize("error", [InputError("changed"), NumericError("a NaN")], ids=repr)
def test_what_would_end_so_again_is_not_kept(tmp_path: Path, error: SmeltError) -> None:
    stopped(tmp_path / "out", error, "t0")
    assert names_in(tmp_path) == []


def test_after_a_failed_sync_nothing_is_kept(tmp_path: Path, faults: Any) -> None:
    """What the system could not write it may have forgotten, and a later sync would not say so."""
    real = faults.real

    def no_sync(what: str, path: Any, call: Any, *args: Any, needed: int = 0) -> Any:
        return real(what, path, faults._fail if what == "sync" else call, *(() if what == "sync" else args))

    build = start(tmp_path / "out", resume=True)
    finish(build, *(tensor.name for tensor in TENSORS))
    files.system = no_sync  # type: ignore[assignment]  # the fixture puts it back
    with pytest.raises(StorageError, match="cannot sync") as caught:
        build.commit()
    build.__exit__(StorageError, caught.value, None)
    assert names_in(tmp_path) == []


# --- leftovers ------------------------------------------------------------------------------------------------------


def test_leftovers_are_found_and_removed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build = start(tmp_path / name)
        finish(build, "t0", "t1")
        die(build)
    with start(tmp_path / "c") as build:
        finish(build, *(tensor.name for tensor in TENSORS))
        build.commit()
    busy = start(tmp_path / "d")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".smelt-build").mkdir()
    found = leftovers(tmp_path)
    assert [(one.out.name, one.tensors, one.busy) for one in found] == [
        ("a", 2, False),
        ("b", 2, False),
        ("d", 0, True),
    ]
    assert found[0].bytes > sum(shard.size for shard in SHARDS.shards)
    assert leftovers(tmp_path / "b") == [found[1]]
    with pytest.raises(StorageError, match="another smelt run"):
        remove_leftover(found[2])
    for one in found[:2]:
        remove_leftover(one)
    busy.abandon()
    assert names_in(tmp_path) == [".smelt-build", "c", "mine.txt"]
    assert leftovers(tmp_path) == []
    with pytest.raises(InputError, match="no such folder"):
        leftovers(tmp_path / "nowhere")


def test_a_former_output_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".out.smelt-old").mkdir()
    (tmp_path / ".out.smelt-old" / "old.txt").touch()
    (tmp_path / ".out.smelt-build").mkdir()
    (one,) = leftovers(tmp_path)
    assert one == Leftover(tmp_path / "out", 0, 0, busy=False)
    remove_leftover(one)
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["old.txt"]
