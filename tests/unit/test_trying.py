"""Sweeps in memory: the bits of merges, state dicts of either kind, scores, inputs and reductions that are kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import factory
import smelt
from smelt.errors import InputError, NumericError, RecipeError
from smelt.methods.selection import KthLargest
from smelt.storage.checkpoint import Checkpoint

RECIPE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "m0",
    "models": [{"model": "m1", "parameters": {"weight": 0.6}}, {"model": "m2", "parameters": {"weight": 0.4}}],
    "parameters": {"density": 0.5, "lambda": 1},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    factory.llamas(tmp_path, 3)
    factory.recipe(tmp_path / "recipe.yml", RECIPE)
    return tmp_path


def states() -> dict[str, dict[str, Any]]:
    return {f"m{i}": factory.llama(seed=i) for i in range(3)}


def test_candidates_are_what_merges_write(folder: Path) -> None:
    over = {"lambda": "0.2:1.0:0.4", "density": [0.3, 0.5]}
    smelt.sweep_to("recipe.yml", over, "out")
    for options in ({}, {"load_inputs": False}, {"workers": 3}):
        found = list(smelt.sweep("recipe.yml", over, **options))  # type: ignore[arg-type]
        assert [one.name for one in found] == [
            f"lambda={a},density={b}" for a in ("0.2", "0.6", "1.0") for b in (0.3, 0.5)
        ]
        for one in found:
            written = factory.stored(folder / "out" / one.name)
            assert {name: value.tobytes() for name, value in written.items()} == {
                name: value.tobytes() for name, value in one.tensors.items()
            }
    assert found[3].settings == {"lambda": 0.6, "density": 0.5}


def test_state_dicts(folder: Path) -> None:
    by_files = {one.name: one for one in smelt.sweep("recipe.yml", {"lambda": [0.5, 1]})}
    by_arrays = list(smelt.sweep(RECIPE, {"lambda": [0.5, 1]}, models=states()))
    assert [one.name for one in by_arrays] == list(by_files)
    for one in by_arrays:
        assert all(np.array_equal(value, by_files[one.name].tensors[name]) for name, value in one.tensors.items())
    assert not np.shares_memory(by_arrays[0].tensors["lm_head.weight"], by_arrays[1].tensors["lm_head.weight"])
    read_only = states()
    for state in read_only.values():
        for value in state.values():
            value.flags.writeable = False
    again = list(smelt.sweep(RECIPE, {"lambda": [0.5, 1]}, models=read_only))
    assert np.array_equal(again[1].tensors["lm_head.weight"], by_arrays[1].tensors["lm_head.weight"])


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch() -> None:
    import torch

    models = {n: {k: torch.from_numpy(v).to(torch.bfloat16) for k, v in s.items()} for n, s in states().items()}
    for one in smelt.sweep(
        RECIPE, {"lambda": [0.5, 1]}, models=models, score=lambda s: s["lm_head.weight"].sum().item()
    ):
        assert one.tensors["lm_head.weight"].dtype is torch.bfloat16
        assert isinstance(one.score, float)


def test_merges_within_the_recipe(folder: Path) -> None:
    tree = {**RECIPE, "models": [{"model": "mean"}, {"model": "m2"}]}
    tree |= {"merges": {"mean": factory.linear("m1", "m2")}, "parameters": {"weight": 0.5, "density": 0.5}}
    over = {"merges.mean.models.m1.weight": [0.5, 2], "lambda": [0.5, 1]}
    smelt.sweep_to(tree, over, "out")
    for one in smelt.sweep(tree, over):
        written = factory.stored(folder / "out" / one.name)
        assert all(np.array_equal(value, one.tensors[name]) for name, value in written.items())
    in_memory = list(smelt.sweep(tree, over, models=states()))
    assert len(in_memory) == 4


def test_reductions_are_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut of ties depends on the density alone; inputs are read from the disk once."""
    closed, read = [], []
    close, read_into = KthLargest.close, Checkpoint.read_into

    def counted(self: KthLargest, total: Any) -> None:
        closed.append(self)
        close(self, total)

    def watched(self: Checkpoint, spec: Any, start: int, stop: int, buffer: Any) -> None:
        read.append(stop - start)
        read_into(self, spec, start, stop, buffer)

    monkeypatch.setattr(KthLargest, "close", counted)
    monkeypatch.setattr(Checkpoint, "read_into", watched)
    candidates = smelt.sweep("recipe.yml", {"density": [0.3, 0.5], "lambda": [0.2, 0.4, 0.6]})
    counts = []
    for _ in candidates:
        counts.append((len(closed), sum(read)))
    size = sum(value.nbytes for i in range(3) for value in factory.stored(folder / f"m{i}").values())
    first, both = counts[0][0], counts[3][0]
    assert both == 2 * first > 0
    assert [count for count, _ in counts] == [first] * 3 + [both] * 3
    assert {total for _, total in counts} == {size}


def test_scores_and_closing(folder: Path) -> None:
    candidates = smelt.sweep("recipe.yml", {"lambda": [0.5, 1]}, score=len)
    assert next(candidates).score == len(factory.llama())
    candidates.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(candidates)


def test_mistakes_are_told_at_once(folder: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean `density`"):
        smelt.sweep("recipe.yml", {"densty": 1})
    with pytest.raises(RecipeError, match="`models` has no 'm2'"):
        smelt.sweep(RECIPE, {"lambda": 1}, models={"m0": {}, "m1": {}})
    with pytest.raises(RecipeError, match="numpy or torch"):
        smelt.sweep(RECIPE, {"lambda": 1}, tensors="jax")
    with pytest.raises(RecipeError, match="method files are not loaded"):
        smelt.sweep(RECIPE | {"methods": ["./own.py"]}, {"lambda": 1}, models=states())
    with pytest.raises(InputError, match="not an array"):
        smelt.sweep(RECIPE, {"lambda": 1}, models={name: {"w": 1} for name in ("m0", "m1", "m2")})
    with pytest.raises(RecipeError, match="number of threads must be at least 1"):
        smelt.sweep(RECIPE, {"lambda": 1}, workers=0)


def test_a_candidate_whose_numbers_cannot_be(folder: Path) -> None:
    candidates = smelt.sweep(RECIPE | {"out_dtype": "float16"}, {"lambda": [1, 1e9]}, models=states())
    assert next(candidates).name == "lambda=1"
    with pytest.raises(NumericError) as raised:
        next(candidates)
    assert "in the candidate lambda=1000000000.0" in raised.value.where
