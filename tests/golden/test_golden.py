"""smelt reproduces MergeKit 0.1.5, from recipe to written checkpoint (data/README.md: cases, tolerances, exemptions).

The tokenizer cases are left out: they need vocabularies to be joined.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16, which safetensors.numpy asks for)
import numpy as np
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import load_file

from reference.two_model import importance, threshold
from smelt.merging import MergeReport, merge

DATA = Path(__file__).parent / "data"
CASES = sorted(path.name for path in (DATA / "cases").iterdir() if not path.name.startswith("tokenizer-"))

Tensors = dict[str, np.ndarray]


def recipe_of(case: str) -> dict[str, Any]:
    return YAML(typ="safe").load(DATA / "cases" / case / "recipe.yml")


METHOD = {case: recipe_of(case)["merge_method"] for case in CASES}


def load(path: Path) -> Tensors:
    return {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}


def model(name: str) -> Tensors:
    return load(DATA / name / "model.safetensors")


def at_the_cut(recipe: dict[str, Any], name: str) -> np.ndarray:
    """ties: entries whose abs(delta) equals the cut of their model; a cut of 0 exempts nothing."""
    base = model(recipe["base_model"])[name]
    exempt = np.zeros(base.shape, bool)
    for source in recipe["models"]:
        magnitude = np.abs(model(source["model"])[name] - base)
        cut = np.sort(magnitude.ravel())[-max(1, int(source["parameters"]["density"] * magnitude.size))]
        exempt |= (magnitude == cut) & (cut > 0.0)
    return exempt


def near_the_threshold(recipe: dict[str, Any], name: str) -> np.ndarray:
    """arcee_fusion: entries whose importance is within 1 % of the threshold."""
    base, tensor = model(recipe["base_model"])[name], model(recipe["models"][0]["model"])[name]
    score = importance(tensor.astype(np.float64), base.astype(np.float64), (tensor - base).astype(np.float64))
    return np.abs(score - threshold(score)) <= 0.01 * threshold(score)


EXEMPT = {"bf16-ties": at_the_cut, "arcee-fusion": near_the_threshold}


def run(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> MergeReport:
    """The case's recipe, its model paths taken from the data folder as the working folder."""
    monkeypatch.chdir(DATA)
    return merge(Path("cases") / case / "recipe.yml", folder, **options)


@pytest.mark.parametrize("case", CASES)
def test_golden_case(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(case)
    report = run(case, tmp_path / "out", monkeypatch, seed=0)
    expected = load(DATA / "cases" / case / "expected.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) == set(expected) == {entry.name for entry in report.plan.entries}
    share = 5e-3 if recipe.get("out_dtype") == "bfloat16" else 1e-5
    for name, want in expected.items():
        got = stored[name]
        assert got.dtype.name == recipe.get("out_dtype", "float32")
        assert got.shape == want.shape
        largest = float(np.abs(want).max())
        off = np.abs(got.astype(np.float64) - want)
        wrong = off > share * (largest if largest > 0.0 else 1.0)
        if case in EXEMPT:
            wrong &= ~EXEMPT[case](recipe, name)
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} entries, off by up to {off[wrong].max()}"


@pytest.mark.parametrize("case", ["passthrough-stack", "qwen-tied-ties", "bf16-linear"])
def test_config_of_the_output(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config counts the layers that were written and names their type."""
    report = run(case, tmp_path / "out", monkeypatch)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = {entry.part.layer for entry in report.plan.entries if entry.part.layer is not None}
    assert config["num_hidden_layers"] == len(layers) == 1 + max(layers)
    assert (config.get("dtype") or config.get("torch_dtype")) == recipe_of(case).get("out_dtype", "float32")


@pytest.mark.parametrize("options", [{"workers": 1, "tile": 65536}, {"workers": 5}, {"shard_bytes": 100_000}], ids=str)
def test_how_it_is_done_does_not_show(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("ties-rescale", tmp_path / "one", monkeypatch)
    run("ties-rescale", tmp_path / "two", monkeypatch, **options)
    one = load_file(tmp_path / "one" / "model.safetensors")
    two: Tensors = {}
    for shard in sorted((tmp_path / "two").glob("*.safetensors")):
        two |= load_file(shard)
    assert {name: tensor.tobytes() for name, tensor in one.items()} == {n: t.tobytes() for n, t in two.items()}
