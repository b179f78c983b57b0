"""Recipes of recipes: one run gives what step after step gives, and reads what is distinct once; keeping; errors."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml

import factory
import smelt as library
from factory import INPUT, NUMERIC, USAGE, config, linear, llama, model, smelt
from smelt.engine import run as engine
from smelt.engine.steps import StepSource


def ties(base: str, *models: str, **keys: Any) -> dict[str, Any]:
    settings = {"weight": 0.5, "density": 0.5}
    tree = {"merge_method": "ties", "base_model": base, "models": [{"model": m} for m in models]}
    return tree | {"parameters": settings} | keys


def stack(*sources: tuple[str, list[int]], **keys: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": name, "layer_range": layers}]} for name, layers in sources]
    return {"merge_method": "passthrough", "slices": slices} | keys


RECIPES: dict[str, dict[str, Any]] = {
    "chance": {
        "merges": {"a": ties("m0", "m1", "m2", merge_method="dare_ties"), "b": linear("m1", "a", dtype="bfloat16")},
        **ties("m0", "a", "b", merge_method="dare_linear"),
    },
    "stacked": {
        "merges": {"deep": stack(("m0", [0, 2]), ("mean", [1, 2])), "mean": linear("m1", "m2")},
        **stack(("deep", [1, 3]), ("m1", [0, 1]), ("deep", [1, 2]), out_dtype="float16"),
    },
    "copied": {"merges": {"a": linear("m1", "m2"), "b": linear("a")}, **stack(("b", [0, 2]))},
    "rotated": {
        "merges": {
            "a": linear("m1", merge_method="slerp", base_model="m0", parameters={"t": [0, 1]}),
            "b": ties("a", "m2", "m1", merge_method="breadcrumbs", parameters={"weight": 0.5, "density": 0.8}),
        },
        **linear("a", "b", "m2", base_model="m0", tokenizer_source="b"),
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for i in range(3):
        tensors = llama(seed=i, dtype=ml_dtypes.bfloat16 if i == 2 else np.float32)
        vocabulary = {"model": {"type": "BPE", "vocab": {chr(97 + i): i for i in range(16)}, "merges": []}}
        files = {"tokenizer.json": json.dumps(vocabulary)}
        files |= {"README.md": "---\nlicense: mit\n---\n", "LICENSE": "as it is", "generation_config.json": "{}"}
        model(folder / f"m{i}", tensors | {"model.ids": np.arange(4)}, config(), files=files)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    return factory.copy(models, tmp_path / "work")


def step_by_step(folder: Path, tree: dict[str, Any], *words: str) -> Path:
    """Each merge as a recipe of its own, written as float32 or as it says, in the order in which they are needed."""
    left = dict(tree["merges"])
    apart = folder / "apart"
    for i in range(3):
        (apart / f"m{i}").parent.mkdir(exist_ok=True)
        (apart / f"m{i}").symlink_to(folder / f"m{i}")
    while left:
        ready = [name for name, step in left.items() if not any(f'"{other}"' in json.dumps(step) for other in left)]
        for name in ready:
            step = left.pop(name)
            typed = step if {"dtype", "out_dtype"} & set(step) else step | {"dtype": "float32"}
            factory.accepted(apart, {k: v for k, v in typed.items() if k != "keep"}, *words, out=name)
    factory.accepted(apart, {key: value for key, value in tree.items() if key != "merges"}, *words, out="out")
    return apart / "out"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_one_run_gives_what_step_by_step_gives(folder: Path, name: str, threads: int) -> None:
    tree = RECIPES[name]
    apart = step_by_step(folder, tree, "--seed", "9")
    factory.accepted(folder, tree, "--seed", "9", "--threads", str(threads))
    for file in ("model.safetensors", "config.json", "generation_config.json", "LICENSE", "tokenizer.json"):
        assert (folder / "out" / file).read_bytes() == (apart / file).read_bytes(), file
    assert sorted(path.name for path in folder.iterdir()) == ["apart", "m0", "m1", "m2", "out", "recipe.yml"]


def test_documents_say_what_merges_say(folder: Path) -> None:
    tree = RECIPES["chance"]
    parts = [{"name": name, **step} for name, step in tree["merges"].items()]
    output = {key: value for key, value in tree.items() if key != "merges"}
    factory.accepted(folder, tree, out="one")
    for number, order in enumerate(([*parts, output], [output, *parts], [*parts, {"name": "last", **output}])):
        factory.accepted(folder, yaml.safe_dump_all(order), out=f"documents-{number}")
        assert weights(folder / f"documents-{number}") == weights(folder / "one")


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_chain_of_ten_reads_what_is_distinct_once(tmp_path: Path, method: str) -> None:
    shape = {"hidden": 64, "vocabulary": 4100}
    sizes = [
        sum(tensor.nbytes for tensor in factory.stored(path).values())
        for path in factory.llamas(tmp_path, 11, dtype=ml_dtypes.bfloat16, **shape)
    ]
    merges: dict[str, Any] = {}
    for i in range(1, 11):
        name = "m1" if i == 1 else f"s{i - 1}"
        step = linear("m0", name, f"m{i}", parameters={"weight": 0.4})
        if method == "task_arithmetic":
            step = linear(name, f"m{i}", merge_method=method, base_model="m0", parameters={"weight": 0.4})
        merges[f"s{i}"] = step if i > 1 else linear("m1", "m0", **{k: step[k] for k in ("parameters",)})
    output = merges.pop("s10") | {"out_dtype": "bfloat16"}
    tree = {"merges": merges, **output}
    recipe = factory.recipe(tmp_path / "recipe.yml", tree)
    for threads in (1, 3):
        done = library.merge(recipe, tmp_path / f"out{threads}", workers=threads)
        assert done.bytes_read == sum(sizes)
    apart = tmp_path / "apart"
    apart.mkdir()
    for i in range(11):
        (apart / f"m{i}").symlink_to(tmp_path / f"m{i}")
    read = written = 0
    for name, step in [*merges.items(), ("end", output)]:
        typed = factory.recipe(apart / "step.yml", {"out_dtype": "float32"} | step)
        one = library.merge(typed, apart / name)
        read, written = read + one.bytes_read, written + one.bytes_written
    assert weights(apart / "end") == weights(tmp_path / "out1") == weights(tmp_path / "out3")
    size = sizes[0]
    assert (read, sum(sizes)) == (38 * size, 11 * size)  # as docs/recipes.md says
    assert sum(weights_written(apart, merges)) == 19 * size
    plan = smelt("plan", recipe, "--json").json
    assert plan["forecast"]["bytes_read"] == sum(sizes)
    apart_bytes = plan["forecast"]["one_after_the_other"]
    assert (apart_bytes["bytes_read"], apart_bytes["bytes_written"]) == (read, sum(weights_written(apart, merges)))
    assert len(plan["merges"]) == 9
    text = smelt("plan", recipe).out
    assert "10 merges in one run: reads " in text
    assert "merge s1: linear of m1, m0, float32, 1 pass, computed where it is needed" in text


def weights_written(apart: Path, merges: dict[str, Any]) -> list[int]:
    """Bytes of the tensors of each merge that was written by itself, the last one too."""
    return [sum(tensor.nbytes for tensor in factory.stored(apart / name).values()) for name in [*merges, "end"]]


@pytest.mark.parametrize("name", RECIPES)
def test_a_merge_reads_no_more_than_its_plan_says(folder: Path, name: str) -> None:
    recipe = factory.recipe(folder / "recipe.yml", RECIPES[name])
    planned = smelt("plan", recipe, "--json").json["forecast"]
    done = smelt("merge", recipe, folder / "out", "--json").json
    assert 0 < done["bytes_read"] <= planned["bytes_read"]


def test_explain_goes_through_the_merges(folder: Path) -> None:
    recipe = factory.recipe(folder / "recipe.yml", RECIPES["chance"])
    text = smelt("plan", recipe, "--explain", "model.norm.weight").out
    assert text.startswith("model.norm.weight  [8]")
    assert "in the merge a: model.norm.weight  [8] float32\n  dare_ties(m1, m2, base m0)" in text
    assert "in the merge b: model.norm.weight  [8] bfloat16\n  linear(m1, a)" in text


def test_inputs_beyond_the_memory_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"merges": {"a": ties("m0", "m1", "m2")}, **ties("m0", "a", "m2")}
    factory.accepted(folder, tree, out="kept")
    monkeypatch.setattr(engine, "KEEP_BYTES", 0)
    factory.accepted(folder, tree, out="out")
    assert weights(folder / "out") == weights(folder / "kept")


# --- papers and verifying -------------------------------------------------------------------------------------------


def test_papers_have_the_whole_recipe_and_no_place(folder: Path) -> None:
    tree = copy.deepcopy(RECIPES["chance"])
    tree["merges"]["b"]["models"][0]["model"] = str(folder / "m1")
    factory.accepted(folder, tree, "--hash-inputs")
    for name in ("smelt.json", "README.md", "mergekit_config.yml"):
        assert str(folder) not in (folder / "out" / name).read_text()
    record = json.loads((folder / "out" / "smelt.json").read_text())
    assert [row["model"] for row in record["inputs"]] == ["m0", "m1", "m2"]
    assert all(len(row["files"][0]["sha256"]) == 64 for row in record["inputs"])
    assert record["inputs"][0]["role"] == "base"
    assert record["merges"]["a"] == {
        "method": "dare_ties",
        "inputs": ["m1", "m2", "m0"],
        "donor": "m0",
        "tokenizer": "m0",
    }
    assert list(record["recipe"]["text"]["merges"]) == ["a", "b"]
    written = yaml.safe_load((folder / "out" / "mergekit_config.yml").read_text())
    assert written == record["recipe"]["text"]
    card = (folder / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model:\n- m1\n- m2\n- m0\n") or "- m0\n- m1\n- m2\n" in card
    assert "license: mit" in card
    assert "| a | merge of this recipe |" in card
    assert "| m2 | in `a` (dare_ties) |" in card


def test_verify_makes_tensors_again_through_the_merges(folder: Path) -> None:
    places = [word for i in range(3) for word in ("--model", f"m{i}={folder / f'm{i}'}")]
    for name, tree in RECIPES.items():
        factory.accepted(folder, tree, "--seed", "9", out=name)
        named = [word for i in range(3) if f"m{i}" in json.dumps(tree) for word in places[2 * i : 2 * i + 2]]
        done = smelt("verify", folder / name, *named, "--sample", "all")
        assert (done.code, "recomputed from the inputs" in done.out) == (0, True), done.text
    raw = bytearray(weights(folder / "m2"))
    length = int.from_bytes(raw[:8], "little")
    start, _ = json.loads(raw[8 : 8 + length])["model.norm.weight"]["data_offsets"]
    raw[8 + length + start + 1] ^= 0x80  # the sign of its first number
    (folder / "m2" / "model.safetensors").write_bytes(raw)
    done = smelt("verify", folder / "chance", *places, "--sample", "all")
    assert done.code == INPUT
    assert "tensor 'model.norm.weight' is not what its inputs give" in done.err


# --- merges that are kept -------------------------------------------------------------------------------------------


KEPT: dict[str, Any] = {
    "merges": {
        "a": ties("m0", "m1", "m2", merge_method="dare_ties") | {"keep": True},
        "b": linear("a", "m1", dtype="bfloat16") | {"keep": True},
    },
    **linear("b", "m2"),
}


def reused(done: factory.Done) -> dict[str, bool]:
    assert done.code == 0, done.text
    return {name: kept["reused"] for name, kept in done.json["kept"].items()}


def test_an_edited_merge_runs_again_and_an_unchanged_one_does_not(folder: Path) -> None:
    expected = weights(step_by_step(folder, KEPT))

    def run(tree: Any, *words: str) -> dict[str, bool]:
        recipe = factory.recipe(folder / "recipe.yml", tree)
        return reused(smelt("merge", recipe, folder / "out", "--overwrite", "--json", *words))

    assert run(KEPT) == {"a": False, "b": False}
    assert weights(folder / "out") == expected
    assert run(KEPT) == {"a": True, "b": True}
    assert weights(folder / "out") == expected
    places = [word for i in range(3) for word in ("--model", f"m{i}={folder / f'm{i}'}")]
    for place in (folder / ".smelt-kept").iterdir():  # each a whole output, which can be verified by itself
        done = smelt("verify", place, *places, "--sample", "all")
        assert (done.code, "recomputed" in done.out) == (0, True), done.text
    text = smelt("plan", folder / "recipe.yml", "--keep-folder", folder / ".smelt-kept").out
    assert text.count("kept, read from") == 2

    later = copy.deepcopy(KEPT)
    later["merges"]["b"]["models"].append({"model": "m2"})
    assert run(later) == {"a": True, "b": False}
    earlier = copy.deepcopy(KEPT)
    earlier["merges"]["a"]["parameters"]["density"] = 0.6
    assert run(earlier) == {"a": False, "b": False}
    assert run(KEPT, "--seed", "1") == {"a": False, "b": False}
    assert run(KEPT) == {"a": True, "b": True}
    os.utime(folder / "m2" / "model.safetensors", ns=(1, 1))
    assert run(KEPT) == {"a": False, "b": False}
    assert weights(folder / "out") == expected


def test_what_is_kept_is_whole_or_made_again(folder: Path) -> None:
    recipe = factory.recipe(folder / "recipe.yml", KEPT)
    kept = folder / "elsewhere"
    words = ("--keep-folder", kept, "--overwrite", "--json")
    assert reused(smelt("merge", recipe, folder / "out", *words)) == {"a": False, "b": False}
    expected = weights(folder / "out")
    planned = smelt("plan", recipe, "--keep-folder", kept, "--json").json
    place = Path(next(row for row in planned["merges"] if row["name"] == "b")["folder"])
    damages = {
        "smelt.json": lambda data: data.replace(b'"seed": 0', b'"seed": 1'),
        "model.safetensors": lambda data: data[:-1],
    }
    for name, damage in damages.items():
        (place / name).write_bytes(damage((place / name).read_bytes()))
        assert reused(smelt("merge", recipe, folder / "out", *words)) == {"a": True, "b": False}
        assert weights(folder / "out") == expected
    (place / "smelt.json").unlink()
    assert reused(smelt("merge", recipe, folder / "out", *words)) == {"a": True, "b": False}


def test_kept_merges_lie_apart_from_output_and_inputs(folder: Path) -> None:
    said = "the output and a merge that is kept would lie in one another"
    factory.refused(folder, KEPT, "--keep-folder", str(folder / "out"), code=4, says=[said])
    said = "the output folder lies in an input"
    factory.refused(folder, KEPT, "--keep-folder", str(folder / "m1"), code=4, says=[said])


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_name_that_is_a_folder_too_is_refused(folder: Path) -> None:
    tree = {"merges": {"m1": linear("m0", "m2")}, **linear("m1", "m0")}
    factory.refused(folder, tree, code=USAGE, says=["'m1' is a merge of this recipe and a folder too", "./m1"])


def test_a_near_name_is_the_merge_that_was_meant(folder: Path) -> None:
    tree = {"merges": {"first_step": linear("m0", "m2")}, **linear("first-step", "first_step")}
    factory.refused(folder, tree, code=INPUT, says=["did you mean the merge `first_step`?"])


def test_problems_of_a_merge_name_it(folder: Path) -> None:
    model(folder / "wide", llama(hidden=16), config(hidden=16))
    tree = {"merges": {"mixed": linear("m0", "wide")}, **linear("mixed", "m0")}
    factory.refused(folder, tree, code=INPUT, says=["in the merge `mixed`", "wide"], problems=2)
    huge = {name: np.full_like(value, 3e38) for name, value in llama().items()}
    model(folder / "huge", huge, config())
    step = linear("huge", "huge2", parameters={"weight": 1, "normalize": False})
    factory.copy(folder / "huge", folder / "huge2")
    tree = {"merges": {"sum": step}, **linear("sum", "m0", parameters={"weight": [1, 0.5]}, allow=["extra_tensor"])}
    factory.refused(folder, tree, code=NUMERIC, says=["would get a NaN or infinity", "huge"])


def test_an_unused_merge_is_a_warning(folder: Path) -> None:
    tree = {"merges": {"a": linear("m0", "m1"), "b": linear("nowhere", "a")}, **linear("a", "m2")}
    done = factory.accepted(folder, tree)
    assert "recipe.yml:17:3: the merge `b` is not used" in done.err
    factory.refused(folder, tree, "--strict", code=USAGE, says=["the merge `b` is not used"], out="other")


def test_warnings_and_notes_of_a_merge_name_it(folder: Path) -> None:
    step = linear("m0", "m1", parameters={"weight": [{"filter": "qproj", "value": 1}, {"value": 0.5}]})
    done = factory.accepted(folder, {"merges": {"a": step}, **linear("a", "m2")})
    assert "warning: in the merge `a`: " in done.err
    assert "'qproj' fits no tensor" in done.err


@pytest.mark.parametrize(
    ("merges", "said"),
    [
        ({"a": linear("a", "m0")}, "a merge is made of itself: a → a"),
        (
            {"a": linear("b"), "b": linear("c"), "c": linear("a")},
            "merges are made of each other in a circle: a → b → c",
        ),
        ({"a": linear("m0"), "org/b": linear("a")}, "a merge cannot be called 'org/b'"),
        ({"a": linear("m0"), "base": linear("a")}, "a merge cannot be called 'base'"),
        ({"a": linear("m0") | {"kep": True}}, "unknown key `kep`"),
        ({"a": linear("m0") | {"merges": {"b": linear("m0")}}}, "unknown key `merges`"),
        ({"a": {"merge_method": "linear"}}, "merge `a` names no models to merge"),
        ({"a": linear("m0", parameters={"wieght": 1})}, "linear has no parameter `wieght`"),
        ({f"s{i}": linear(f"s{i - 1}" if i else "m0") for i in range(33)}, "over more than 32 levels"),
    ],
)
def test_what_no_merge_can_be(folder: Path, merges: Any, said: str) -> None:
    name = "a" if "a" in merges else "s32"
    recipe = factory.recipe(folder / "recipe.yml", {"merges": merges, **linear(name, "m0")})
    done = smelt("merge", recipe, folder / "out")
    assert done.code == USAGE, done.text
    assert said in done.err
    assert "recipe.yml:" in done.err


def test_thirty_two_levels_are_possible(folder: Path) -> None:
    merges = {f"s{i}": linear(f"s{i - 1}" if i else "m1", "m0") for i in range(32)}
    factory.accepted(folder, {"merges": merges, **linear("s31", "m2")}, "--threads", "2")


def test_a_closed_step_gives_nothing_away_between_runs(folder: Path) -> None:
    """What a run found out is forgotten at its end, after a failure too: the next one computes anew."""
    recipe = factory.recipe(folder / "recipe.yml", RECIPES["chance"])
    with library.merging.prepare(recipe) as prepared:
        steps = [model.source for model in prepared.models if isinstance(model.source, StepSource)]
        assert steps
        sink = _Failing()
        sources = [model.source for model in prepared.models]
        with pytest.raises(OSError, match="full"):
            engine.run(prepared.plan, sources, sink, workers=3)
        for step in steps:
            assert not step._made
            assert step._workshop is None


class _Failing:
    """A sink that is full at once."""

    def write(self, name: str, start: int, data: Any) -> None:
        raise OSError("full")

    def read_back(self, name: str, start: int, stop: int, buffer: Any) -> None:
        raise OSError("full")
