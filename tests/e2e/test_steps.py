"""Merges within a recipe and all else that a merge may be told: memory, stops, devices, lines, missing, sweeps."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import factory
import faulty
import smelt as library
from e2e.test_nested import KEPT, RECIPES, step_by_step, ties, weights
from factory import INPUT, USAGE, accepted, config, linear, llama, model, recipe, refused, smelt, snapshot, stored
from smelt.cli.main import Stopped
from smelt.preparing import prepare
from smelt.storage import files, journal

CUT = {"weight": 0.5, "density": 0.4}
WHOLE: dict[str, Any] = {
    "merges": {
        "a": ties("m0", "m1", "m2", parameters={**CUT, "granularity": "model"}) | {"keep": True},
        "b": ties("m0", "a", "m1", parameters={**CUT, "granularity": "model", "rescale": True}) | {"keep": True},
    },
    **linear("b", "m2"),
}
"""Kept merges that look at the whole model first, one of which is made of the other."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small models, the last of another type."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    vocabulary = {"model": {"type": "BPE", "vocab": {chr(97 + i): i for i in range(16)}, "merges": []}}
    for i in range(3):
        tensors = llama(seed=i, dtype=ml_dtypes.bfloat16 if i == 2 else np.float32)
        model(tmp_path / f"m{i}", tensors, config(), files={"tokenizer.json": json.dumps(vocabulary)})
    return tmp_path


def plain(tree: dict[str, Any]) -> dict[str, Any]:
    """The recipe with nothing kept."""
    merges = {name: {k: v for k, v in one.items() if k != "keep"} for name, one in tree["merges"].items()}
    return tree | {"merges": merges}


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RECIPES, "kept", "whole"])
def test_a_cap_on_memory_is_kept_and_changes_nothing(folder: Path, name: str) -> None:
    tree = {**RECIPES, "kept": KEPT, "whole": WHOLE}[name]
    path = recipe(folder / "recipe.yml", tree)
    free = smelt("plan", path, "--threads", 4, "--json").json["forecast"]
    done = refused(folder, tree, "--memory", "1MB", code=USAGE, says=["the merge does not fit into 1 MB of memory"])
    assert "with one thread" in done
    fix = re.search(r"fix: allow it more: --memory (\d+)MB", done)
    assert fix is not None
    least = int(fix[1])
    assert 1e6 * least < free["memory"]
    refused(folder, tree, "--memory", f"{least - 1}MB", code=USAGE, says=[f"--memory {least}MB"])
    accepted(folder, plain(tree), "--seed", "9", out="free")
    for cap in dict.fromkeys((least, (least + free["memory"] // 1_000_000) // 2)):
        capped = smelt("plan", path, "--threads", 4, "--memory", f"{cap}MB", "--json").json["forecast"]
        assert capped["memory"] <= cap * 1e6
        words = ("--memory", f"{cap}MB", "--threads", 4, "--seed", 9, "--keep-folder", folder / f"kept{cap}")
        accepted(folder, tree, *words, out=f"out{cap}")
        assert weights(folder / f"out{cap}") == weights(folder / "free")


def test_the_tensor_that_is_too_large_may_be_one_of_a_merge_within(folder: Path) -> None:
    """A matrix whose decomposition takes more than all else, in a merge that the output only averages."""
    for i in range(3):
        tensors = llama(seed=i) | {"model.layers.1.wide.weight": np.ones((600, 700), np.float32)}
        model(folder / f"m{i}", tensors, config())
    inner = linear("m1", "m2", merge_method="tsv", base_model="m0", parameters={})
    tree = {"merges": {"a": inner}, **linear("a", "m1")}
    says = ["does not fit into 100 MB of memory", "largest tensor model.layers.1.wide.weight [600, 700]"]
    refused(folder, tree, "--memory", "100MB", code=USAGE, says=says)
    few = smelt("plan", recipe(folder / "few.yml", linear("m0", "m1")), "--json").json["forecast"]["memory"]
    all_of_it = smelt("plan", folder / "recipe.yml", "--json").json["forecast"]["memory"]
    assert all_of_it > few + 3 * 4 * 600 * 700


# --- stopping, and going on -----------------------------------------------------------------------------------------


SHARDS = ("--shard-size", "1kB", "--threads", "2")


def kept_folders(folder: Path, place: Path) -> dict[str, Path]:
    """Where the merges that the recipe keeps will lie, for an output in `place`."""
    rows = smelt("plan", folder / "recipe.yml", "--keep-folder", place / ".smelt-kept", "--json").json["merges"]
    return {row["name"]: Path(row["folder"]) for row in rows if "folder" in row}


def cut_off(folder: Path, words: list[object], out: Path, *, tensors: int = 3) -> int:
    """Kill a run while it writes `out`, when about `tensors` tensors stand in its journal; gives how many do."""
    build = f".{out.name}.smelt-build"
    for at in [*range(16, 200, 2)] * 2:
        ended = faulty.forked(words, folder, at=at, within=build)
        assert ended.code == -signal.SIGKILL, (at, ended.err)
        found = journal.read(out.parent / f"{build}.journal")
        if found is not None and len(found.finished) >= tensors:
            return len(found.finished)
    raise AssertionError("the merge was never cut off late enough")


@pytest.mark.parametrize("stage", ["a", "b", "out"])
@pytest.mark.parametrize("name", ["drawn", "whole"])
def test_a_run_that_was_killed_while_a_merge_was_kept_goes_on(folder: Path, name: str, stage: str) -> None:
    """What was kept before is left as it is, the unfinished one goes on, and the bytes are the same in the end."""
    path = recipe(folder / "recipe.yml", {"drawn": KEPT, "whole": WHOLE}[name])
    for at in ("whole", "place"):
        (folder / at).mkdir()
    assert smelt("merge", path, folder / "whole" / "out", *SHARDS).code == 0
    place = folder / "place"
    kept = kept_folders(folder, place)
    assert list(kept) == ["a", "b"]
    words: list[object] = ["merge", path, place / "out", *SHARDS]
    count = cut_off(folder, words, {**kept, "out": place / "out"}[stage])
    before = [one for one in kept if (kept[one] / "smelt.json").exists()]
    assert before == {"a": [], "b": ["a"], "out": ["a", "b"]}[stage]
    assert not (place / "out").exists()
    seen = {one: stamps(kept[one]) for one in before}

    done = smelt(*words, "--resume")
    assert done.code == 0, done.text
    where = "" if stage == "out" else f"in the merge `{stage}`: "
    assert done.err.count("resuming: ") == 1
    assert f"note: {where}resuming: {count} of 9 tensors were finished" in done.err
    assert {one: stamps(kept[one]) for one in before} == seen
    assert snapshot(place) == snapshot(folder / "whole")
    assert {path.name for path in place.iterdir()} == {"out", ".smelt-kept"}
    again = smelt(*words, "--resume", "--overwrite", "--json").json
    assert [one["reused"] for one in again["kept"].values()] == [True, True]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of a folder."""
    return {path.name: ((stat := path.stat()).st_ino, stat.st_mtime_ns) for path in sorted(folder.iterdir())}


@pytest.fixture
def stopped_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that sends Ctrl-C when the weights below a folder have been written to so often."""

    def set_up(place: Path, count: int) -> None:
        calls = 0
        real = files.WriteFile.write_at

        def write_at(file: Any, offset: int, data: Any) -> None:
            nonlocal calls
            weights = file.path.suffix == ".safetensors" and place.name in file.path.parent.name
            calls += weights
            if weights and calls == count:
                raise Stopped(signal.SIGINT)
            real(file, offset, data)

        monkeypatch.setattr(files.WriteFile, "write_at", write_at)

    yield set_up
    monkeypatch.undo()


@pytest.mark.parametrize("resume", [False, True])
def test_ctrl_c_says_what_stays_of_kept_merges(
    folder: Path, stopped_in: Any, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    path = recipe(folder / "recipe.yml", KEPT)
    (folder / "place").mkdir()
    kept = kept_folders(folder, folder / "place")
    words = ["merge", path, folder / "place" / "out", "--shard-size", "1kB", "--threads", 1]
    more = ["--resume"] if resume else []
    stopped_in(kept["b"], 8)
    done = smelt(*words, *more)
    assert done.code == 130, done.text
    last = done.err.splitlines()[-1]
    assert f"the merge `a` is finished, and kept in {kept['a']}" in last
    assert "the merge `b`" not in last
    assert "nothing was left behind" not in last
    assert (f"smelt clean {folder / 'place' / '.smelt-kept'}`" in last) == resume
    left = {entry.name for entry in (folder / "place" / ".smelt-kept").iterdir()}
    unfinished = {f".{kept['b'].name}.smelt-build", f".{kept['b'].name}.smelt-build.journal"}
    assert left == {kept["a"].name} | (unfinished if resume else set())
    monkeypatch.undo()
    again = smelt(*words, "--resume")
    assert again.code == 0, again.text
    assert ("note: in the merge `b`: resuming: " in again.err) == resume
    assert weights_of(folder / "place" / "out") == weights_of(step_by_step(folder, KEPT))


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in stored(folder).items()}


def test_what_a_killed_run_left_among_kept_merges_can_be_cleaned(folder: Path) -> None:
    path = recipe(folder / "recipe.yml", KEPT)
    (folder / "place").mkdir()
    kept = kept_folders(folder, folder / "place")
    cut_off(folder, ["merge", path, folder / "place" / "out", *SHARDS], kept["b"])
    done = smelt("clean", folder / "place" / ".smelt-kept")
    assert done.code == 0
    assert done.out.startswith(f"{kept['b']}: removed ")
    assert os.listdir(folder / "place" / ".smelt-kept") == [kept["a"].name]


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RECIPES, "whole"])
def test_on_a_device(folder: Path, name: str) -> None:
    """Within one unit in the last place of the output's type, of each number."""
    pytest.importorskip("torch")
    tree = {**RECIPES, "whole": plain(WHOLE)}[name]
    accepted(folder, tree, "--seed", "9", out="here")
    accepted(folder, tree, "--seed", "9", "--device", "torch:cpu", "--threads", "3", out="there")
    here, there = stored(folder / "here"), stored(folder / "there")
    assert list(here) == list(there)
    coarse = "bfloat16" in json.dumps(tree)  # of a merge within
    for tensor, want in here.items():
        assert there[tensor].dtype == want.dtype
        number = want.astype(np.float64)
        unit = 2.0**-7 * np.abs(number) if coarse else np.spacing(np.abs(want)).astype(np.float64)
        assert (np.abs(there[tensor].astype(np.float64) - number) <= unit).all(), tensor
    assert json.loads((folder / "there" / "smelt.json").read_text())["device"]["name"] == "torch:cpu"


def test_what_was_kept_on_the_cpu_is_not_that_of_a_device(folder: Path) -> None:
    pytest.importorskip("torch")
    path = recipe(folder / "recipe.yml", KEPT)
    words = ("--overwrite", "--json")

    def reused(*more: str) -> list[bool]:
        done = smelt("merge", path, folder / "out", *words, *more)
        assert done.code == 0, done.text
        return [one["reused"] for one in done.json["kept"].values()]

    assert reused() == [False, False]
    assert reused("--device", "torch:cpu") == [False, False]
    assert reused() == reused("--device", "torch:cpu") == [True, True]
    devices = [
        json.loads((kept / "smelt.json").read_text()).get("device", {}).get("name")
        for kept in (folder / ".smelt-kept").iterdir()
    ]
    assert sorted(map(str, devices)) == ["None", "None", "torch:cpu", "torch:cpu"]


def test_the_memory_of_a_device_counts_merges_within(folder: Path) -> None:
    """Each thread works on one level at a time, so it is that of the one which takes most."""
    alone = factory.recipe(folder / "alone.yml", ties("m0", "m1", "m2", "m1", "m2"))
    tree = {"merges": {"a": ties("m0", "m1", "m2", "m1", "m2")}, **linear("a")}
    with (
        prepare(alone, device="cuda") as one,
        prepare(recipe(folder / "recipe.yml", tree), device="cuda") as nested,
        prepare(recipe(folder / "outer.yml", linear("m1")), device="cuda") as outer,
    ):
        assert outer.forecast.device_memory < one.forecast.device_memory == nested.forecast.device_memory


# --- lines ----------------------------------------------------------------------------------------------------------

LINES = {"alpha": 0.2, "beta": 0.9}
SLICED = {"slices": [{"sources": [{"model": name, "layer_range": [1, 2]} for name in ("m0", "m1")]}] * 3}


@pytest.mark.parametrize(
    "step",
    [
        ties("m0", "m1", "m2", lines=LINES),
        {"merge_method": "ties", "base_model": "m0", "parameters": CUT, "lines": LINES, **SLICED},
    ],
    ids=["models", "slices"],
)
def test_lines_of_a_merge_within_count_its_own_layers(folder: Path, step: dict[str, Any]) -> None:
    tree = {"merges": {"a": step}, **linear("a")}
    apart = step_by_step(folder, tree)
    accepted(folder, tree)
    assert weights(folder / "out") == weights(apart)
    bare = {"merges": {"a": {k: v for k, v in step.items() if k != "lines"}}, **linear("a")}
    accepted(folder, bare, out="bare")
    assert weights(folder / "out") != weights(folder / "bare")
    last = 2 if "slices" in step else 1
    recipe(folder / "recipe.yml", tree)
    for layer, factor in ((0, 0.2), (last, 1.1)):
        told = smelt("plan", folder / "recipe.yml", "--explain", f"model.layers.{layer}.mlp.up_proj.weight").out
        _, _, inner = told.partition("in the merge a: ")
        assert f"lambda={factor}" in inner, told
    places = [word for i in range(3) for word in ("--model", f"m{i}={folder / f'm{i}'}") if f"m{i}" in json.dumps(step)]
    assert smelt("verify", folder / "out", *places, "--sample", "all").code == 0


def test_lines_of_the_output_count_its_layers_and_leave_merges_within_alone(folder: Path) -> None:
    tree = {"merges": {"a": linear("m1", "m2")}, **ties("m0", "a", "m1", lines=LINES)}
    apart = step_by_step(folder, tree)
    accepted(folder, tree)
    assert weights(folder / "out") == weights(apart)


def test_lines_that_a_merge_within_cannot_have_name_it(folder: Path) -> None:
    tree = {"merges": {"a": linear("m1", "m2", lines=LINES)}, **linear("a", "m1")}
    refused(folder, tree, code=USAGE, says=["lines", "recipe.yml:"])


# --- tensors that not all models have -------------------------------------------------------------------------------

EXTRA = "model.layers.1.extra.weight"


@pytest.fixture
def uneven(folder: Path) -> Path:
    """Of the three models only m1 has a further tensor, of half the width."""
    extra = {EXTRA: np.array([1.5, 2.5, 3.5], ml_dtypes.bfloat16)}
    model(folder / "m1", llama(seed=1) | extra, config())
    return folder


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("word", "outer"),
    [("skip", linear("a", "m0")), ("copy", linear("a", "m1")), ("copy", linear("a", "m2", missing="skip"))],
    ids=["skip", "copy", "copy-then-skip"],
)
def test_missing_counts_for_the_merge_in_which_it_stands(
    uneven: Path, word: str, outer: dict[str, Any], keep: bool
) -> None:
    inner = linear("m1", "m2", missing=word) | ({"keep": True} if keep else {})
    tree = {"merges": {"a": inner}, **outer}
    apart = step_by_step(uneven, tree)
    done = accepted(uneven, tree)
    assert weights(uneven / "out") == weights(apart)
    verb = "leaves out 1 tensor that m2 lacks" if word == "skip" else "copies 1 tensor that m2 lacks from m1"
    assert f"warning: in the merge `a`: `missing: {word}` {verb}: {EXTRA}" in done.err
    there = stored(uneven / "out").get(EXTRA)
    assert (there is None) == (word == "skip" or "missing" in outer)
    if there is not None:
        assert (there.tolist(), there.dtype) == ([1.5, 2.5, 3.5], np.float32)
    refused(uneven, tree, "--strict", code=USAGE, says=[f"missing: {word}"], out="strict")
    named = [word for i in range(3) for word in ("--model", f"m{i}={uneven / f'm{i}'}") if f"m{i}" in json.dumps(tree)]
    verified = smelt("verify", uneven / "out", *named, "--sample", "all")
    assert verified.code == 0, verified.text


def test_missing_of_the_output_does_not_reach_a_merge_within(uneven: Path) -> None:
    tree = {"merges": {"a": linear("m1", "m2")}, **linear("a", "m0", missing="skip")}
    says = [f"tensor '{EXTRA}' is missing in m2", "in the merge `a`"]
    refused(uneven, tree, code=INPUT, says=says)


def test_what_a_merge_within_leaves_out_is_missing_in_the_output(uneven: Path) -> None:
    tree = {"merges": {"a": linear("m1", "m2", missing="skip")}, **linear("m1", "a")}
    refused(uneven, tree, code=INPUT, says=[f"tensor '{EXTRA}' is missing in a"])
    accepted(uneven, tree | {"missing": "copy"})
    assert stored(uneven / "out")[EXTRA].tolist() == [1.5, 2.5, 3.5]


# --- sweeps ---------------------------------------------------------------------------------------------------------


def sweep(folder: Path, *words: object) -> factory.Done:
    done = smelt("sweep", folder / "recipe.yml", "--out", folder / "sweep", *words)
    assert done.code == 0, done.text
    return done


def same_as_merges(folder: Path, tree: dict[str, Any], density: str) -> None:
    """The candidate's weights are those of a merge in which nothing is kept."""
    alone = copy.deepcopy(plain(tree))
    alone["merges"]["a"]["parameters"]["density"] = float(density)
    accepted(folder, alone, out=f"alone-{density}")
    found = folder / "sweep" / f"merges.a.density={density}"
    assert weights(found) == weights(folder / f"alone-{density}")
    recipe(folder / "recipe.yml", tree)


@pytest.mark.parametrize("tree", [KEPT, WHOLE], ids=["drawn", "whole"])
def test_a_sweep_over_a_setting_of_a_kept_merge_keeps_one_for_each_value(folder: Path, tree: dict[str, Any]) -> None:
    recipe(folder / "recipe.yml", tree)
    kept = folder / ".smelt-kept"
    sweep(folder, "--over", "merges.a.density=0.3,0.6")
    assert len(list(kept.iterdir())) == 4  # a, and b that is made of it
    for density in ("0.3", "0.6"):
        same_as_merges(folder, tree, density)
    seen = {path: stamps(path) for path in kept.iterdir()}
    assert "2 of them done already" in sweep(folder, "--over", "merges.a.density=0.3,0.6,0.9").err
    same_as_merges(folder, tree, "0.9")
    assert len(list(kept.iterdir())) == 6
    assert {path: stamps(path) for path in seen} == seen
    values = json.loads(json.dumps(tree))
    values["merges"]["a"]["parameters"]["density"] = 0.6
    done = smelt("merge", recipe(folder / "one.yml", values), folder / "one", "--json")
    assert [one["reused"] for one in done.json["kept"].values()] == [True, True]  # of merges and sweeps alike


def test_a_sweep_that_was_killed_while_a_merge_was_kept_goes_on(folder: Path) -> None:
    recipe(folder / "recipe.yml", KEPT)
    second = copy.deepcopy(KEPT)
    second["merges"]["a"]["parameters"]["density"] = 0.6
    recipe(folder / "second.yml", second)
    rows = smelt("plan", folder / "second.yml", "--keep-folder", folder / ".smelt-kept", "--json").json["merges"]
    out = Path(next(row["folder"] for row in rows if row["name"] == "b"))
    over = ["--over", "merges.a.density=0.3,0.6"]
    words: list[object] = ["sweep", folder / "recipe.yml", "--out", folder / "sweep", *over, *SHARDS]
    count = cut_off(folder, words, out)
    done = smelt(*words, "--resume")
    assert done.code == 0, done.text
    assert f"note: in the merge `b`: resuming: {count} of 9 tensors were finished" in done.err
    assert not [path for path in (folder / ".smelt-kept").iterdir() if path.name.startswith(".")]
    for density in ("0.3", "0.6"):
        found = weights_of(folder / "sweep" / f"merges.a.density={density}")
        alone = copy.deepcopy(plain(KEPT))
        alone["merges"]["a"]["parameters"]["density"] = float(density)
        accepted(folder, alone, out=f"alone-{density}")
        assert found == weights_of(folder / f"alone-{density}")


def test_in_memory_nothing_is_kept_and_the_numbers_are_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = recipe(folder / "recipe.yml", KEPT)
    before = snapshot(folder)
    found = {one.name: dict(one.tensors) for one in library.sweep(path, {"merges.a.density": "0.3,0.6"})}
    assert snapshot(folder) == before
    sweep(folder, "--over", "merges.a.density=0.3,0.6")
    assert len(found) == 2
    for name, tensors in found.items():
        want = stored(folder / "sweep" / name)
        assert {key: np.asarray(tensor).tobytes() for key, tensor in tensors.items()} == {
            key: tensor.tobytes() for key, tensor in want.items()
        }


def test_a_sweep_keeps_nothing_in_an_input(folder: Path) -> None:
    recipe(folder / "recipe.yml", KEPT)
    before = snapshot(folder)
    for words in (["--dry-run"], []):
        over = ("--over", "merges.a.density=0.3,0.6", "--keep-folder", folder / "m1", *words)
        done = smelt("sweep", folder / "recipe.yml", "--out", folder / "sweep", *over)
        assert done.code == factory.STORAGE, done.text
        assert "the output folder lies in an input" in done.err
        assert snapshot(folder) == before
