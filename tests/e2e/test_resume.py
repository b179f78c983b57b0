"""Merges that are cut off and go on: `--resume`, `smelt clean`, what they refuse. `make kills` does it at length."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import factory
import faulty
import smelt as library
from factory import STORAGE, config, linear, llama, model, recipe, smelt, snapshot
from smelt.cli.main import Stopped
from smelt.storage import files, journal

TIES = {"merge_method": "ties", "parameters": {"weight": 1, "density": 0.5}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small models, a recipe that has several passes, and its output `whole/out`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    factory.llamas(tmp_path, 3)
    recipe(tmp_path / "recipe.yml", linear("m1", "m2", base_model="m0", **TIES))
    assert smelt("merge", tmp_path / "recipe.yml", tmp_path / "whole" / "out", "--shard-size", "1kB").code == 0
    (tmp_path / "place").mkdir()
    return tmp_path


def words(folder: Path, *more: object, shard_size: str = "1kB") -> list[object]:
    return ["merge", folder / "recipe.yml", folder / "place" / "out", "--shard-size", shard_size, *more]


def cut_off(folder: Path, *more: object, tensors: int = 4) -> int:
    """Kill a merge when about `tensors` tensors stand in its journal; gives how many do."""
    path = folder / "place" / ".out.smelt-build.journal"
    for at in range(40, 400, 4):
        ended = faulty.forked(words(folder, *more), folder, at=at)
        assert ended.code == -signal.SIGKILL, ended.err
        found = journal.read(path)
        if found is not None and len(found.finished) >= tensors:
            return len(found.finished)
    raise AssertionError("the merge was never cut off late enough")


def whole(folder: Path) -> bool:
    return snapshot(folder / "place" / "out") == snapshot(folder / "whole" / "out")


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_killed_merge_goes_on(folder: Path) -> None:
    count = cut_off(folder)
    done = smelt(*words(folder, "--resume"))
    assert done.code == 0, done.text
    assert f"note: resuming: {count} of 9 tensors were finished, and are as they were written" in done.err
    assert whole(folder)
    assert os.listdir(folder / "place") == ["out"]
    assert smelt("verify", folder / "place" / "out").code == 0


def test_other_threads_and_tiles_may_go_on(folder: Path) -> None:
    count = cut_off(folder, "--threads", 2)
    report = library.merge(
        folder / "recipe.yml", folder / "place" / "out", resume=True, shard_bytes=1000, workers=1, tile=1 << 16
    )
    assert report.resumed == count
    assert whole(folder)


def test_without_resume_it_begins_anew_and_says_so(folder: Path) -> None:
    cut_off(folder)
    done = smelt(*words(folder))
    assert done.code == 0
    assert "note: the unfinished output of an earlier run was removed" in done.err
    assert whole(folder)


def test_resume_with_nothing_to_resume(folder: Path) -> None:
    done = smelt(*words(folder, "--resume", "--json"))
    assert done.json["resumed"] == 0
    assert whole(folder)


def test_numbers_that_are_no_numbers_are_counted_though_they_were_written_before(folder: Path) -> None:
    """The count of NaNs of a tensor that an earlier run wrote is in the record and in the warning."""
    tensors = llama(seed=1)
    tensors["model.embed_tokens.weight"][0, :3] = np.nan
    shutil.rmtree(folder / "m1")
    model(folder / "m1", tensors, config())
    shutil.rmtree(folder / "whole")
    first = smelt("merge", folder / "recipe.yml", folder / "whole" / "out", "--shard-size", "1kB")
    assert "3 numbers of the output are NaN" in first.err
    cut_off(folder, "--threads", 1)
    done = smelt(*words(folder, "--resume"))
    assert "3 numbers of the output are NaN" in done.err
    assert whole(folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("at", range(5, 220, 23))
def test_a_kill_anywhere(folder: Path, at: int, overwrite: bool) -> None:
    more = ["--overwrite"] if overwrite else []
    if overwrite:
        shutil.copytree(folder / "m0", folder / "place" / "out")
    before = snapshot(folder / "place")
    ended = faulty.forked(words(folder, *more), folder, at=at)
    if ended.code == 0:
        assert ended.calls <= at
        assert whole(folder)
        return
    assert ended.code == -signal.SIGKILL
    if not (folder / "place" / "out").exists():
        assert not overwrite or (folder / "place" / ".out.smelt-old").exists()
    elif not whole(folder):
        assert {name: what for name, what in snapshot(folder / "place").items() if not name.startswith(".")} == before
    done = smelt(*words(folder, "--resume", "--overwrite"))
    assert done.code == 0, done.text
    assert whole(folder)
    assert os.listdir(folder / "place") == ["out"]


# --- merges within the recipe ---------------------------------------------------------------------------------------


def within(folder: Path, weight: float = 1) -> None:
    """A recipe whose merge `a` uses m2, which the output itself does not."""
    inner = linear("m1", "m2", parameters={"weight": weight})
    recipe(folder / "recipe.yml", {"merges": {"a": inner}, **linear("m1", "a", base_model="m0", **TIES)})


def test_a_killed_merge_of_merges_goes_on(folder: Path) -> None:
    within(folder)
    cut_off(folder)
    assert smelt(*words(folder, "--resume")).code == 0
    again = smelt("merge", folder / "recipe.yml", folder / "alone" / "out", "--shard-size", "1kB")
    assert again.code == 0, again.text
    assert snapshot(folder / "place" / "out") == snapshot(folder / "alone" / "out")


@pytest.mark.parametrize("change", ["the merge", "an input of it"])
def test_what_a_merge_within_is_made_of_counts(folder: Path, change: str) -> None:
    within(folder)
    cut_off(folder)
    if change == "the merge":
        within(folder, weight=2)
        refused(folder, "merges: a was changed", *words(folder, "--resume"))
    else:
        stamp = (folder / "m2" / "model.safetensors").stat().st_mtime_ns + 10**9
        os.utime(folder / "m2" / "model.safetensors", ns=(stamp, stamp))
        refused(folder, "input: m2/model.safetensors was changed", *words(folder, "--resume"))


# --- refusing -------------------------------------------------------------------------------------------------------


def touch(folder: Path) -> None:
    """The same bytes, another time."""
    stamp = (folder / "m1" / "model.safetensors").stat().st_mtime_ns + 10**9
    os.utime(folder / "m1" / "model.safetensors", ns=(stamp, stamp))


def replace(folder: Path) -> None:
    """Other numbers under the same header, size and time: another file all the same."""
    old = (folder / "m1" / "model.safetensors").stat()
    model(folder / "new", llama(seed=9), config())
    os.utime(folder / "new" / "model.safetensors", ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(folder / "new" / "model.safetensors", folder / "m1" / "model.safetensors")


CHANGES: dict[str, tuple[Callable[[Path], Any], list[object], str]] = {
    "recipe": (lambda f: recipe(f / "recipe.yml", linear("m1", "m2", **TIES | {"base_model": "m1"})), [], "recipe: "),
    "seed": (lambda f: None, ["--seed", 1], "seed: 0 then, 1 now"),
    "allow": (lambda f: None, ["--allow", "nonfinite"], "allow: nothing then, nonfinite now"),
    "input touched": (touch, [], "input: m1/model.safetensors was changed"),
    "input replaced": (replace, [], "input: m1/model.safetensors was changed"),
    "config": (
        lambda f: (f / "m0" / "config.json").write_text(json.dumps(config(rms_norm_eps=1e-3))),
        [],
        "small file: config.json was changed",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_merge_is_refused(folder: Path, change: str) -> None:
    cut_off(folder)
    act, more, says = CHANGES[change]
    act(folder)
    refused(folder, says, *words(folder, "--resume", *more))


def refused(folder: Path, says: str, *words: object) -> None:
    (folder / "place" / ".out.smelt-build.lock").unlink()  # of the process that was killed; the next run removes it
    before = snapshot(folder)
    done = smelt(*words)
    assert done.code == STORAGE, done.text
    assert "error: cannot resume: the unfinished output is that of another merge" in done.err
    assert says in done.err
    assert "fix: " in done.err
    assert snapshot(folder) == before


def test_another_shard_size_is_refused(folder: Path) -> None:
    cut_off(folder)
    refused(folder, "shard size: 1000 then, 2000 now", *words(folder, "--resume", shard_size="2kB"))


def test_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(folder)
    monkeypatch.setattr("smelt.lineage.identity.__version__", "99.0")
    refused(folder, f"smelt: {library.__version__} then, 99.0 now", *words(folder, "--resume"))


def test_a_method_file_that_was_changed_is_refused(folder: Path) -> None:
    code = '''
"""A method of one's own."""

from smelt.methods.api import Array, Method, register


@register("half", source="here")
class Half(Method):
    """Half of a model."""

    def tile(self, x: Array) -> Array:
        return x[0] * 0.5
'''
    (folder / "half.py").write_text(code)
    recipe(folder / "recipe.yml", {"merge_method": "half", "models": [{"model": "m0"}], "methods": ["half.py"]})
    cut_off(folder, "--trust-methods")
    (folder / "half.py").write_text(code.replace("0.5", "0.25"))
    refused(folder, "methods: half.py was changed", *words(folder, "--resume", "--trust-methods"))


# --- stopping and cleaning ------------------------------------------------------------------------------------------


def test_a_stop_with_resume_keeps_what_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle, as the command line tells it; then the same command goes on."""
    calls = 0
    real = files.WriteFile.write_at

    def write_at(file: Any, offset: int, data: Any) -> None:
        nonlocal calls
        weights = file.path.suffix == ".safetensors"
        calls += weights
        if weights and calls == 12:
            raise Stopped(signal.SIGINT)
        real(file, offset, data)

    monkeypatch.setattr(files.WriteFile, "write_at", write_at)
    done = smelt(*words(folder, "--resume", "--threads", 1))
    assert done.code == 130
    found = journal.read(folder / "place" / ".out.smelt-build.journal")
    assert found is not None
    count = len(found.finished)
    assert count > 0
    assert done.err.endswith(
        f"interrupted: {count} of 9 tensors are finished and kept: run again with --resume to go on, "
        f"or remove them with `smelt clean {folder / 'place'}`\n"
    )
    monkeypatch.undo()
    assert smelt(*words(folder, "--resume", "--json")).json["resumed"] == count
    assert whole(folder)


def test_clean_lists_and_removes(folder: Path) -> None:
    count = cut_off(folder)
    place = folder / "place"
    (place / "mine.txt").write_text("mine")
    listed = smelt("clean", place, "--list")
    assert listed.code == 0
    assert listed.out.startswith(f"{place / 'out'}: unfinished, {count} finished tensors, ")
    assert (place / ".out.smelt-build").exists()
    assert smelt("clean", place, "--list", "--json").json["leftovers"][0]["tensors"] == count
    removed = smelt("clean", place)
    assert removed.out.startswith(f"{place / 'out'}: removed {count} finished tensors, ")
    assert os.listdir(place) == ["mine.txt"]
    assert smelt("clean", place).out == f"{place}: nothing is left of any merge\n"
    assert smelt("clean", folder / "nowhere").code == 3
