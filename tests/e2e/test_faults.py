"""File operation k of a merge fails, for k = 1, 2, ...: exit 4 with a sentence, and never half an output.

`make test` takes some of the points, `make faults` all of them (SMELT_TEST_STRIDE=1) and real faults of the system.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest

import factory
import faulty
from factory import INPUT, STORAGE, linear, recipe, smelt, snapshot
from faulty import eager_journal, failing, short_writes
from smelt.storage import journal

STRIDE = int(os.environ.get("SMELT_TEST_STRIDE", "13"))
"""Every so many file operations one fails."""
TIES = {"merge_method": "ties", "parameters": {"weight": 1, "density": 0.5}}
OURS = (".out.smelt-build", ".out.smelt-build.journal", ".out.smelt-build.lock", ".out.smelt-old")


class Case:
    """Three models, a recipe, and what its output must be; `begin` sets up the place of a merge in some state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        models = factory.llamas(folder, 3)
        self.recipe = recipe(folder / "recipe.yml", linear("m1", "m2", base_model="m0", **TIES))
        old = recipe(folder / "old.yml", linear(*models))
        (folder / "whole").mkdir()
        assert self.merge(folder / "whole" / "out").code == 0
        assert smelt("merge", old, folder / "old").code == 0
        self.new, self.old = snapshot(folder / "whole" / "out"), snapshot(folder / "old")
        self.partial = folder / "partial"
        self._cut_off()
        self.place = folder / "place"

    def merge(self, out: Path, *more: object) -> factory.Done:
        return smelt("merge", self.recipe, out, "--shard-size", "1kB", "--threads", 2, *more)

    def _cut_off(self) -> None:
        """A place with an unfinished output whose journal has some tensors."""
        for at in [*range(60, 400, 3)] * 3:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
            words = ["merge", self.recipe, self.partial / "out", "--shard-size", "1kB"]
            if faulty.forked(words, self.folder, at=at).code != -signal.SIGKILL:
                continue  # it had fewer calls than that
            found = journal.read(self.partial / OURS[1])
            if found is not None and 1 < len(found.finished) < 8:
                return
        raise AssertionError("no merge was cut off with some of its tensors finished")

    def begin(self, mode: str) -> list[str]:
        """An empty place, one with an old output, or one with an unfinished one; gives the options for it."""
        shutil.rmtree(self.place, ignore_errors=True)
        if mode == "resume":
            shutil.copytree(self.partial, self.place)
            return ["--resume"]
        self.place.mkdir()
        if mode == "overwrite":
            shutil.copytree(self.folder / "old", self.place / "out")
            return ["--overwrite"]
        return []

    def check(self, mode: str, done: factory.Done, failed: str | None, *, dead: bool = False) -> str:
        """The promises after a run in which the call `failed` was refused; says what the user finds.

        On a `dead` disk the old output can stay where it was put aside: it cannot be renamed back.
        """
        assert "Traceback" not in done.text, (failed, done.text)
        assert "defect" not in done.text, (failed, done.text)
        out = self.place / "out"
        left = {path.name for path in self.place.iterdir()} - {"out"}
        assert left <= set(OURS), (failed, left)
        if done.code == 0 or "is in place" in done.err:
            assert snapshot(out) == self.new, failed
            return "new"
        assert done.code in (STORAGE, INPUT), (failed, done.text)
        assert done.err.count("error: ") >= 1
        if dead and mode == "overwrite" and not out.exists():
            assert snapshot(self.place / OURS[3]) == self.old
            assert OURS[3] in done.err
            return "aside"
        if mode == "overwrite":
            assert snapshot(out) == self.old, failed
        else:
            assert not out.exists(), failed
        if mode != "resume":
            assert left <= {OURS[2]}, (failed, left)
        return "old" if mode == "overwrite" else "nothing"

    def finish(self) -> None:
        """Whatever was left, the next run ends with the same files, and nothing beside them."""
        done = self.merge(self.place / "out", "--resume", "--overwrite")
        assert done.code == 0, done.text
        assert snapshot(self.place) == {"out": "folder", **{f"out/{name}": what for name, what in self.new.items()}}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return Case(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("mode", ["fresh", "overwrite", "resume"])
def test_every_file_operation_that_fails(case: Case, mode: str, lasting: bool) -> None:
    threads = threading.active_count()
    seen: Counter[tuple[str | None, str]] = Counter()
    at = STRIDE // 2
    while True:
        words = case.begin(mode)
        with eager_journal(), failing(at, errno.EIO, lasting=lasting) as fault:
            done = case.merge(case.place / "out", *words)
        assert threading.active_count() == threads
        state = case.check(mode, done, fault.failed, dead=lasting)
        seen[fault.failed, state] += 1
        case.finish()
        if fault.failed is None:
            break
        at += STRIDE
    print(f"\n{sum(seen.values()) - 1} points of {mode}, {dict(seen)}")
    assert done.code == 0
    assert state == "new"


@pytest.mark.parametrize("mode", ["fresh", "overwrite", "resume"])
@pytest.mark.parametrize("only", ["write", "reserve", "create folder"])
def test_the_disk_is_full(case: Case, mode: str, only: str) -> None:
    """From call k on there is no space."""
    at = points = 0
    while True:
        words = case.begin(mode)
        with eager_journal(), failing(at, errno.ENOSPC, only=only, lasting=True) as fault:
            done = case.merge(case.place / "out", *words)
        state = case.check(mode, done, fault.failed)
        if fault.failed is None:
            break
        assert (done.code, state) == (STORAGE, "old" if mode == "overwrite" else "nothing")
        assert "no space left" in done.err
        assert "fix: free some space" in done.err
        if mode == "resume" and only == "write":
            assert "are finished and kept: run again with --resume" in done.err
        points += 1
        case.finish()
        at += 1 if only != "write" else max(1, STRIDE // 4)
    print(f"\n{points} points of {mode}, {only}")
    assert points or (mode, only) == ("resume", "create folder")


@pytest.mark.parametrize("mode", ["fresh", "overwrite", "resume"])
def test_a_rename_across_file_systems(case: Case, mode: str) -> None:
    at = 0
    while True:
        words = case.begin(mode)
        with failing(at, errno.EXDEV, only="rename") as fault:
            done = case.merge(case.place / "out", *words)
        case.check(mode, done, fault.failed)
        if fault.failed is None:
            break
        assert done.code == STORAGE
        assert "cannot rename to" in done.err
        case.finish()
        at += 1
    assert at == (2 if mode == "overwrite" else 1)


@pytest.mark.parametrize("mode", ["fresh", "overwrite", "resume"])
def test_what_cannot_be_removed(case: Case, mode: str) -> None:
    """Before the work it ends the merge, after it the output is there; the next run removes what was left."""
    at = 0
    while True:
        words = case.begin(mode)
        with failing(at, errno.EBUSY, only="remove") as fault:
            done = case.merge(case.place / "out", *words)
        state = case.check(mode, done, fault.failed)
        assert (done.code == 0) == (state == "new")
        case.finish()
        if fault.failed is None:
            break
        at += 1
    assert at >= 1


def test_a_sync_that_fails_is_not_tried_again(case: Case) -> None:
    """Not even with --resume is anything kept: what the disk holds is unknown, though it reads well."""
    case.begin("fresh")
    with eager_journal(), failing(0, errno.EIO, only="sync") as fault:
        done = case.merge(case.place / "out", "--resume")
    assert fault.failed == "sync"
    assert (done.code, os.listdir(case.place)) == (STORAGE, []), done.text
    assert "cannot sync" in done.err


@pytest.mark.parametrize("mode", ["fresh", "overwrite", "resume"])
def test_short_reads_and_writes_change_nothing(case: Case, mode: str) -> None:
    words = case.begin(mode)
    with eager_journal(), short_writes():
        done = case.merge(case.place / "out", *words)
    assert done.code == 0, done.text
    assert snapshot(case.place / "out") == case.new
