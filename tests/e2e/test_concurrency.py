"""Several runs at once: on one output, on many, from the same inputs; and inputs that change meanwhile."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

import factory
import faulty
import smelt as library
from factory import command, linear, recipe, smelt, snapshot
from smelt.errors import InputError, StorageError
from smelt.storage import files
from smelt.storage.leftovers import leftovers
from smelt.storage.locking import lock_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models and a recipe."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    factory.llamas(tmp_path, 2)
    recipe(tmp_path / "recipe.yml", linear("m0", "m1"))
    return tmp_path


def processes(folder: Path, outs: list[str], *more: str) -> list[tuple[int, str]]:
    """Start a merge for each output at the same moment; gives exit codes and messages."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(
            command("merge", folder / "recipe.yml", folder / out, *more),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for out in outs
    ]
    ended = [process.communicate(timeout=120) for process in running]
    return [(process.returncode, err) for process, (_, err) in zip(running, ended, strict=True)]


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]], ids=["", "resume", "overwrite"])
def test_many_runs_on_one_output(folder: Path, more: list[str]) -> None:
    """At least one ends well; the others end well too, or are told why not; the output is whole."""
    ended = processes(folder, ["out"] * 4, *more)
    said = ("another smelt run is writing here", "the output folder is not empty")
    assert any(code == 0 for code, _ in ended)
    for code, err in ended:
        assert code == 0 or (code == 4 and any(words in err for words in said)), err
    assert smelt("verify", folder / "out").code == 0
    assert not leftovers(folder)


def test_many_runs_on_many_outputs_from_one_input_folder(folder: Path) -> None:
    before = snapshot(folder)
    names = [f"out{i}" for i in range(4)]
    assert [code for code, _ in processes(folder, names)] == [0] * 4
    for name in names:
        assert smelt("verify", folder / name).code == 0
    weights = {snapshot(folder / name)["model.safetensors"] for name in names}
    assert len(weights) == 1
    assert {name: what for name, what in snapshot(folder).items() if not name.startswith("out")} == before


def test_runs_of_one_process(folder: Path) -> None:
    """Threads of one program merge into their own outputs, and two of them into the same."""
    failures: list[BaseException] = []

    def work(out: str) -> None:
        try:
            library.merge(folder / "recipe.yml", folder / out)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(out,)) for out in ("a", "b", "c", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in "abc":
        assert smelt("verify", folder / out).code == 0
    assert len(failures) == 1
    assert isinstance(failures[0], StorageError)


def test_a_run_at_work_is_not_cleaned(folder: Path) -> None:
    lock = lock_folder(folder / ".out.smelt-build")
    (folder / ".out.smelt-build").mkdir()
    try:
        done = smelt("clean", folder)
        assert done.out == f"{folder / 'out'}: a merge is at work on it\n"
        assert (folder / ".out.smelt-build").exists()
        assert smelt("merge", folder / "recipe.yml", folder / "out", "--resume").code == 4
    finally:
        lock.release()
    assert smelt("clean", folder, "-q").code == 0
    assert not (folder / ".out.smelt-build").exists()


# --- inputs that change while they are read ---------------------------------------------------------------------------


def during(folder: Path, change: Any, *, resume: bool = False) -> None:
    """Merge, with `change(path)` made to an input when the first bytes of the output are written."""
    path = folder / "m1" / "model.safetensors"
    real = files.WriteFile.write_at
    first = threading.Lock()

    def write_at(file: Any, offset: int, data: Any) -> None:
        if file.path.suffix == ".safetensors" and offset > 8 and first.acquire(blocking=False):
            change(path)
        real(file, offset, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.WriteFile, "write_at", write_at)
        library.merge(folder / "recipe.yml", folder / "out", resume=resume)


def edit(path: Path) -> None:
    """In place: one byte of the last tensor."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


def swap(path: Path) -> None:
    """Another file of the same bytes and times takes the name."""
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("change", [edit, swap, cut, os.unlink], ids=lambda change: change.__name__)
def test_an_input_that_changes_meanwhile_is_detected(folder: Path, change: Any, resume: bool) -> None:
    """By its size, time or inode. Nothing is kept, with --resume either: what was read may be half old, half new."""
    before = set(os.listdir(folder))
    with pytest.raises(InputError, match=r"changed while they were being read|the file ends early|no such file"):
        during(folder, change, resume=resume)
    assert set(os.listdir(folder)) == before


def test_an_input_that_changed_between_the_runs_is_detected(folder: Path) -> None:
    for at in (90, 110, 130):
        ended = faulty.forked(["merge", folder / "recipe.yml", folder / "out"], folder, at=at)
        if (folder / ".out.smelt-build.journal").exists():
            break
    assert ended.code == -9
    edit(folder / "m1" / "model.safetensors")
    done = smelt("merge", folder / "recipe.yml", folder / "out", "--resume")
    assert done.code == 4
    assert "input: m1/model.safetensors was changed" in done.err
