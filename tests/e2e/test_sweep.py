"""`smelt sweep`: every candidate is what `smelt merge` writes; what is there stays; scores; interruptions; refusals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import factory
import smelt as library
from factory import INPUT, NUMERIC, STORAGE, USAGE, command, linear, recipe, smelt, snapshot
from smelt import sweeping
from smelt.cli.main import Stopped
from smelt.listing import INDEX

TIES = {
    "merge_method": "ties",
    "base_model": "m0",
    "models": [{"model": "m1", "parameters": {"weight": 0.6}}, {"model": "m2", "parameters": {"weight": 0.4}}],
    "parameters": {"density": 0.5, "lambda": 1},
}
NESTED = {
    "merges": {"mean": linear("m1", "m2"), "deep": {**TIES, "models": [{"model": "mean"}, {"model": "m2"}]}},
    **TIES,
    "models": [{"model": "deep"}, {"model": "mean"}],
    "parameters": {"weight": 0.5, "density": 0.5, "lambda": 1},
}
NESTED["merges"]["deep"]["parameters"] = {"weight": 0.5, "density": 0.5}
SIZES = f"{sys.executable} -c 'import sys; print(sys.argv[1].rpartition(\"=\")[2])' {{}}"
"""A command whose score is the value of the last setting."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small models and a recipe."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    factory.llamas(tmp_path, 3)
    recipe(tmp_path / "recipe.yml", TIES)
    return tmp_path


def sweep(folder: Path, *words: object, out: str = "out", name: str = "recipe.yml") -> factory.Done:
    return smelt("sweep", folder / name, "--out", folder / out, *words)


def index(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "out" / INDEX).read_text())
    return {row["name"]: row for row in tree["candidates"]}


def same_as_merges(folder: Path, *, out: str = "out", words: tuple[object, ...] = ()) -> list[str]:
    """Merge the recipe of each candidate by itself; all files must be the same. Gives the names."""
    names = sorted(path.name for path in (folder / out).iterdir() if path.is_dir())
    for name in names:
        text = (folder / out / name / "mergekit_config.yml").read_text()
        done = smelt("merge", recipe(folder / "one.yml", text), folder / "by-merges" / name, *words)
        assert done.code == 0, done.err
        assert snapshot(folder / "by-merges" / name) == snapshot(folder / out / name)
    return names


# --- what is written ------------------------------------------------------------------------------------------------


def test_every_candidate_is_what_a_merge_writes(folder: Path) -> None:
    done = sweep(folder, "--over", "lambda=0.2:1.0:0.4", "--over", "models.m1.weight=0.3,0.5", "--shard-size", "1kB")
    assert done.code == 0, done.err
    names = same_as_merges(folder, words=("--shard-size", "1kB"))
    assert names == sorted(f"lambda={a},models.m1.weight={b}" for a in ("0.2", "0.6", "1.0") for b in ("0.3", "0.5"))
    weights = [factory.stored(folder / "out" / name)["lm_head.weight"].tobytes() for name in names]
    assert len(set(weights)) == 6
    rows = index(folder)
    assert rows["lambda=0.6,models.m1.weight=0.5"]["settings"] == {"lambda": 0.6, "models.m1.weight": 0.5}
    assert {row["state"] for row in rows.values()} == {"written"}
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted([*names, INDEX])  # no lock, no journal
    for name in names:
        assert smelt("verify", folder / "out" / name, "--sample", 0).code == 0


@pytest.mark.parametrize(
    ("tree", "over"),
    [
        (TIES | {"merge_method": "dare_ties"}, ["density=0.2,0.7", "rescale=true,false,density"]),
        (TIES | {"merge_method": "della", "parameters": {"density": 0.5, "epsilon": 0.1}}, ["lambda=0.5,1"]),
        (linear("m0", "m1", merge_method="slerp", base_model="m0", models=[{"model": "m1"}]), ["t=0:1:0.5"]),
        (linear("m1", "m2", merge_method="nuslerp"), ["nuslerp_row_wise=true,false", "models.m1.weight=1,2"]),
        (
            linear("m1", "m2", merge_method="model_stock", base_model="m0", parameters={}),
            ["filter_wise=true,false"],
        ),
        (
            TIES | {"parameters": {"density": 0.5, "lambda": [{"filter": "mlp", "value": 1}, {"value": 0.5}]}},
            ["lambda[0].value=0:1:0.5"],
        ),
        (TIES | {"lines": {"alpha": 0.1, "beta": 1}}, ["lines.beta=0,1", "lambda=1"]),
        (linear("m1", merge_method="passthrough", parameters={}), ["scale=1,0.5"]),
        (NESTED, ["lambda=0.5,1", "density=0.3,0.6"]),
        (NESTED, ["merges.deep.density=0.3,0.6", "lambda=0.5,1", "merges.mean.weight=1"]),
    ],
    ids=["random", "rows", "angle", "grains", "filters", "cases", "layers", "copies", "nested", "inner"],
)
def test_methods_and_recipes_of_all_kinds(folder: Path, tree: dict[str, Any], over: list[str]) -> None:
    if tree["merge_method"] == "slerp":
        tree = tree | {"parameters": {"t": 0.5}}
    recipe(folder / "recipe.yml", tree)
    words = [word for one in over for word in ("--over", one)]
    for threads in (1, 3):
        done = sweep(folder, *words, "--threads", threads, "--seed", 7, out=f"out{threads}")
        assert done.code == 0, done.err
    names = same_as_merges(folder, out="out1", words=("--seed", 7))
    assert snapshot(folder / "out1") == snapshot(folder / "out3")
    assert len(names) == len(library_variants(folder, over))


def library_variants(folder: Path, over: list[str]) -> list[Any]:
    from smelt.recipe.parse import load
    from smelt.recipe.sweeps import read_over, variants

    return variants(load(folder / "recipe.yml"), read_over(over))


def test_batches_give_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep(folder, "--over", "lambda=0.1:0.7:0.1", out="whole").code == 0
    monkeypatch.setattr(sweeping, "MOST_AT_ONCE", 3)
    done = sweep(folder, "--over", "lambda=0.1:0.7:0.1")
    assert done.code == 0
    assert "in 3 batches" in done.err
    assert snapshot(folder / "whole") == snapshot(folder / "out")


def test_memory_and_open_files_bound_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "_descriptors", lambda: 30)
    assert "in 3 batches" in sweep(folder, "--over", "lambda=0.1:0.7:0.1", "--dry-run").err  # 15 files, 5 for each
    monkeypatch.undo()
    least = sweep(folder, "--over", "lambda=0.1:0.7:0.1", "--memory", "1MB", "--dry-run")
    assert least.code == USAGE
    assert "does not fit" in least.err


def test_bytes_that_are_read(folder: Path) -> None:
    done = sweep(folder, "--over", "lambda=0.2:1.2:0.2", "--json")
    tree = done.json
    size = sum(tensor.nbytes for i in range(3) for tensor in factory.stored(folder / f"m{i}").values())
    assert tree["bytes_read"] == size
    assert tree["bytes_read_by_merges"] == 6 * size
    assert tree["bytes_written"] == sum(row["bytes"] for row in tree["candidates"])


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    before = snapshot(folder)
    done = sweep(folder, "--over", "lambda=0.5,1", "--dry-run")
    assert done.code == 0
    assert snapshot(folder) == before
    assert [line.split()[0] for line in done.out.splitlines()] == ["lambda=0.5", "lambda=1"]
    assert "as 2 merges it would read" in done.err
    tree = sweep(folder, "--over", "lambda=0.5,1", "--dry-run", "--json").json
    assert [row["settings"] for row in tree["candidates"]] == [{"lambda": 0.5}, {"lambda": 1}]
    assert snapshot(folder) == before


def test_kept_merges(folder: Path) -> None:
    tree = json.loads(json.dumps(NESTED))
    tree["merges"]["mean"]["keep"] = True
    recipe(folder / "recipe.yml", tree)
    assert sweep(folder, "--over", "merges.deep.lambda=0.5,1", "--over", "density=0.3,0.6").code == 0
    assert len(list((folder / ".smelt-kept").iterdir())) == 1
    same_as_merges(folder)


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    report = library.sweep_to("recipe.yml", {"lambda": [0.5, 1], "models.m1.weight": "0.1:0.3:0.1"}, "out")
    assert len(report.rows) == 6
    assert report.rows[0].settings == {"lambda": 0.5, "models.m1.weight": 0.1}
    same_as_merges(folder)
    again = library.sweep_to("recipe.yml", ["lambda=0.5,1", "models.m1.weight=0.1:0.3:0.1"], "out")
    assert all(one.there for one in again.plan.candidates)


# --- what is there --------------------------------------------------------------------------------------------------


def test_candidates_that_are_there_are_left(folder: Path) -> None:
    assert sweep(folder, "--over", "lambda=0.2,0.4").code == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.safetensors")}
    done = sweep(folder, "--over", "lambda=0.2:0.8:0.2")
    assert done.code == 0
    assert "4 candidates, 2 of them done already" in done.err
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert len(same_as_merges(folder)) == 4
    assert sweep(folder, "--over", "lambda=0.2", "--overwrite").code == 0
    assert set(index(folder)) == {f"lambda=0.{n}" for n in (2, 4, 6, 8)}  # what other sweeps wrote stays listed


def test_a_changed_input_makes_candidates_strangers(folder: Path) -> None:
    assert sweep(folder, "--over", "lambda=0.2,0.4").code == 0
    factory.model(folder / "m1", factory.llama(seed=9), factory.config())
    before = snapshot(folder)
    done = sweep(folder, "--over", "lambda=0.2,0.4")
    assert done.code == STORAGE
    assert done.err.count("the output folder is not empty") == 2
    assert snapshot(folder) == before
    assert sweep(folder, "--over", "lambda=0.2,0.4", "--overwrite").code == 0
    same_as_merges(folder)


@pytest.mark.parametrize("harm", ["weights", "record", "missing", "other"])
def test_a_candidate_that_is_not_what_it_was_is_no_candidate(folder: Path, harm: str) -> None:
    assert sweep(folder, "--over", "lambda=0.2,0.4").code == 0
    place = folder / "out" / "lambda=0.2"
    if harm == "weights":
        os.truncate(place / "model.safetensors", 100)
    elif harm == "record":
        (place / "smelt.json").write_text((place / "smelt.json").read_text().replace("ties", "tyes"))
    elif harm == "missing":
        (place / "smelt.json").unlink()
    else:
        shutil.rmtree(place)
        shutil.copytree(folder / "out" / "lambda=0.4", place)
    done = sweep(folder, "--over", "lambda=0.2,0.4")
    assert done.code == STORAGE
    assert "not empty" in done.err
    assert sweep(folder, "--over", "lambda=0.2,0.4", "--overwrite").code == 0
    same_as_merges(folder)


def test_an_old_folder_is_not_taken_for_the_new_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --overwrite, and killed before the new candidate has its name."""
    assert sweep(folder, "--over", "lambda=0.2").code == 0
    factory.model(folder / "m1", factory.llama(seed=9), factory.config())

    def die(*_: object, **__: object) -> None:
        raise SystemExit(9)

    monkeypatch.setattr(sweeping, "run_variants", die)
    monkeypatch.setattr(sweeping._Sweep, "_end_after", lambda *_: None)  # as if killed
    with pytest.raises(SystemExit):
        sweep(folder, "--over", "lambda=0.2", "--overwrite")
    monkeypatch.undo()
    assert sweep(folder, "--over", "lambda=0.2").code == STORAGE
    assert sweep(folder, "--over", "lambda=0.2", "--overwrite").code == 0
    same_as_merges(folder)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_rank_and_the_best_are_kept(folder: Path) -> None:
    words = ("--over", "lambda=0.2:1.0:0.2", "--score", SIZES)
    done = sweep(folder, *words)
    assert done.code == 0, done.err
    shown = [line.split() for line in done.out.splitlines()[:5]]
    values = [("1.0", "1"), ("0.8", "0.8"), ("0.6", "0.6"), ("0.4", "0.4"), ("0.2", "0.2")]
    assert shown == [[f"lambda={value}", score] for value, score in values]
    assert index(folder)["lambda=0.4"]["scores"] == {"score": 0.4}
    kept = sweep(folder, *words, "--lowest", "--keep-best", 2)
    assert kept.code == 0, kept.err
    assert sorted(path.name for path in (folder / "out").iterdir() if path.is_dir()) == ["lambda=0.2", "lambda=0.4"]
    assert [line.split()[-1] for line in kept.out.splitlines()[2:5]] == ["removed"] * 3
    again = sweep(folder, *words, "--lowest", "--keep-best", 1)
    assert "5 candidates, 5 of them done already" in again.err  # those that were removed are not made again
    assert [path.name for path in (folder / "out").iterdir() if path.is_dir()] == ["lambda=0.2"]
    assert "4 of them" not in sweep(folder, *words, "--lowest", "--keep-best", 3).err
    assert len([path for path in (folder / "out").iterdir() if path.is_dir()]) == 3


def test_only_candidates_of_the_sweep_are_removed(folder: Path) -> None:
    assert sweep(folder, "--over", "lambda=0.1", "--score", SIZES).code == 0
    (folder / "out" / "mine").mkdir()
    assert sweep(folder, "--over", "lambda=0.2,0.4", "--score", SIZES, "--keep-best", 1).code == 0
    assert sorted(path.name for path in (folder / "out").iterdir() if path.is_dir()) == [
        "lambda=0.1",
        "lambda=0.4",
        "mine",
    ]


def test_a_command_that_fails_loses_nothing(folder: Path) -> None:
    script = folder / "score.py"
    script.write_text(
        "import sys\nif '0.4' in sys.argv[1]: sys.exit('no score today')\nprint('{\"a\": 1, \"b\": 2}')\n"
    )
    words = ("--over", "lambda=0.2,0.4,0.6", "--score", f"{sys.executable} {script} {{}}", "--keep-best", 1)
    done = sweep(folder, *words)
    assert done.code == INPUT
    assert "in the candidate lambda=0.4" in done.err
    assert "| no score today" in done.err
    assert [line.split()[0] for line in done.out.splitlines()[:3]] == ["lambda=0.2", "lambda=0.6", "lambda=0.4"]
    assert "a 1, b 2" in done.out
    assert sorted(p.name for p in (folder / "out").iterdir() if p.is_dir()) == ["lambda=0.2", "lambda=0.4"]
    script.write_text("print(5)\n")
    again = sweep(folder, *words, "--json")
    assert again.code == 0
    assert again.json["ranking"][0] == "lambda=0.4"  # the others have their scores


def test_numbers_that_cannot_be_written_end_one_candidate(folder: Path) -> None:
    recipe(folder / "recipe.yml", TIES | {"out_dtype": "float16"})
    done = sweep(folder, "--over", "lambda=0.5,1e9,1")
    assert done.code == NUMERIC
    assert "in the candidate lambda=1e9" in done.err
    assert same_as_merges(folder) == ["lambda=0.5", "lambda=1"]
    assert index(folder)["lambda=1e9"]["state"] == "failed"
    only = sweep(folder, "--over", "lambda=1e9", out="other")
    assert only.code == NUMERIC
    assert not (folder / "other" / "lambda=1e9").exists()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--over", "density=0.5,all"], USAGE, "in the candidate density=all"),
        (["--over", "densty=0.5"], USAGE, "did you mean `density`?"),
        (["--over", "weight=0.5"], USAGE, "models[0].parameters.weight, models[1].parameters.weight"),
        (["--over", "lambda=0:1:0.0001"], USAGE, "1000 is the most"),
        (["--over", "lambda=1", "--keep-best", "1"], USAGE, "without scores"),
        (["--over", "lambda=1", "--score", "e {}", "--keep-best", "0"], USAGE, "at least 1"),
        (["--over", "lambda=1", "--score", "e"], USAGE, "has no {}"),
        (["--over", "lambda=1", "--threads", "0"], USAGE, "at least 1"),
        ([], USAGE, "--over"),
    ],
)
def test_mistakes(folder: Path, words: list[str], code: int, said: str) -> None:
    before = snapshot(folder)
    done = sweep(folder, *words)
    assert done.code == code, done.text
    assert said in done.err
    assert "defect" not in done.err
    assert snapshot(folder) == before


def test_places_that_cannot_be(folder: Path) -> None:
    (folder / "file").write_text("")
    assert "is not a folder" in sweep(folder, "--over", "lambda=1", out="file").err
    recipe(folder / "bad.yml", TIES | {"base_model": "./absent"})
    assert "no model at './absent'" in sweep(folder, "--over", "lambda=1", name="bad.yml").err
    (folder / "out" / "lambda=1").mkdir(parents=True)
    shutil.copytree(folder / "m1", folder / "out" / "lambda=1" / "m1")
    recipe(folder / "in.yml", json.loads(json.dumps(TIES).replace('"m1"', '"out/lambda=1/m1"')))
    done = sweep(folder, "--over", "lambda=1", "--overwrite", name="in.yml")
    assert done.code == STORAGE
    assert "holds an input" in done.err
    (folder / "out" / INDEX).write_text("[]")
    assert "is not the index of a sweep" in sweep(folder, "--over", "lambda=0.5").err


def test_space_is_asked_for_before_any_arithmetic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.storage import files

    before = snapshot(folder)
    monkeypatch.setattr(files, "free_bytes", lambda _: 100 << 20)
    done = sweep(folder, "--over", "lambda=0.1:0.7:0.1")
    assert done.code == STORAGE
    assert "not enough space: 7 candidates need" in done.err
    assert snapshot(folder) == before
    assert sweep(folder, "--over", "lambda=0.1:0.3:0.1").code == 0


def test_one_sweep_at_a_time(folder: Path) -> None:
    from smelt.storage.locking import lock_folder

    (folder / "out").mkdir()
    lock = lock_folder(folder / "out" / ".smelt-sweep")
    try:
        done = sweep(folder, "--over", "lambda=1")
    finally:
        lock.release()
    assert done.code == STORAGE
    assert "another smelt run" in done.err


# --- interruptions --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose merge by a method without kernels takes a second."""
    folder = tmp_path_factory.mktemp("large")
    noise = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": noise for i in range(6)}
    for i in range(3):
        rolled = {name: np.roll(values, i, axis=0) for name, values in tensors.items()}
        factory.model(folder / f"m{i}", rolled, factory.config(layers=6))
    settings = {"density": 0.5, "granularity": "row"}
    tree = linear("m1", "m2", merge_method="pcb", base_model="m0", parameters=settings)
    recipe(folder / "recipe.yml", tree)
    return folder


def start(folder: Path, out: Path, *words: object) -> subprocess.Popen[str]:
    """Begin a sweep of three candidates, and return when it is at work on the weights."""
    over = ("--over", "lambda=0.5,0.75,1", "--out", out, "--threads", 1, *words)
    running = subprocess.Popen(
        command("sweep", folder / "recipe.yml", *over), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (out / ".lambda=1.smelt-build" / "model.safetensors").exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    return running


def test_a_signal_leaves_nothing(large: Path, tmp_path: Path) -> None:
    running = start(large, tmp_path / "new" / "out")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted: nothing was left behind"
    assert snapshot(tmp_path) == {}


def share_written(path: Path) -> float:
    """The share of a file in which something has been written: blocks that are no longer all zeros."""
    blocks = np.fromfile(path, dtype=np.uint64)[:: 1 << 10]
    return np.count_nonzero(blocks) / blocks.size


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_cut_off_goes_on(large: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    running = start(large, out, "--resume")
    written = out / ".lambda=1.smelt-build" / "model.safetensors"
    deadline = time.monotonic() + 60
    while share_written(written) < 0.4:  # one thread, tensor by tensor: some of six are finished
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    if number == signal.SIGINT:
        assert "0 of 3 candidates are finished and stay" in err
        assert "--resume goes on" in err
    words = ("--over", "lambda=0.5,0.75,1", "--threads", 1)
    done = smelt("sweep", large / "recipe.yml", *words, "--out", out, "--resume")
    assert done.code == 0, done.err
    if number == signal.SIGINT:
        assert "resuming: " in done.err
    assert smelt("sweep", large / "recipe.yml", *words, "--out", tmp_path / "whole").code == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_finished_candidates_survive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second batch, or while a candidate is scored: the first batch stays, and is not made again."""
    monkeypatch.setattr(sweeping, "MOST_AT_ONCE", 2)
    original, calls = sweeping.run_variants, []

    def second_is_interrupted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Stopped(signal.SIGINT)
        return original(*arguments, **keywords)

    monkeypatch.setattr(sweeping, "run_variants", second_is_interrupted)
    done = sweep(folder, "--over", "lambda=0.2:0.8:0.2")
    assert done.code == 130
    assert "2 of 4 candidates are finished and stay: run again to go on" in done.err
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["lambda=0.2", "lambda=0.4", INDEX]
    words = ("--over", "lambda=0.2:0.8:0.2", "--score", f"{shlex.quote(sys.executable)} -c 'print(1)' {{}}")
    monkeypatch.setattr("smelt.scoring.Scorer.score", lambda *_: (_ for _ in ()).throw(Stopped(signal.SIGINT)))
    assert sweep(folder, *words).code == 130
    monkeypatch.undo()
    again = sweep(folder, *words)
    assert again.code == 0
    assert "4 candidates, 2 of them done already" in again.err
    assert len(same_as_merges(folder)) == 4
