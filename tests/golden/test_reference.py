"""The references reproduce MergeKit 0.1.5 (see data/README.md for the cases, tolerances and exemptions).

Recipes are read here by a small resolver of its own, so that nothing of smelt takes part: what these tests prove
is that the mathematics in `reference/` is the one people's recipes were written for.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16, which safetensors.numpy asks for)
import numpy as np
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import load_file

from reference.registry import REFERENCE
from reference.two_model import importance, threshold

DATA = Path(__file__).parent / "data"
CASES = sorted(p.name for p in (DATA / "cases").iterdir() if not p.name.startswith("tokenizer-"))
PER_MODEL = {"weight", "density", "gamma", "scale"}
RENAMED = {"lambda": "lambda_"}

Tensors = dict[str, np.ndarray]


@functools.cache
def load(path: Path) -> Tensors:
    """A safetensors file's tensors in float32."""
    return {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}


def model(name: str) -> Tensors:
    return load(DATA / name / "model.safetensors")


# Recipes: which layers and which numbers each output tensor gets.


@dataclass(frozen=True)
class Entry:
    """One output tensor: its name, the models' tensors in order, the base's (None without), the method's parameters."""

    name: str
    models: list[np.ndarray]
    base: np.ndarray | None
    parameters: dict[str, Any]


def gradient(value: Any, t: float) -> Any:
    """A number, or a list of numbers read at t in [0, 1], linear between its members."""
    if not isinstance(value, list):
        return value
    return float(np.interp(t * (len(value) - 1), range(len(value)), value))


def setting(levels: list[dict[str, Any]], key: str, name: str, t: float) -> Any:
    """The value of `key` for tensor `name` from the first level that has one; None where no level does."""
    for level in levels:
        value = level.get(key)
        if value is None:
            continue
        if not (isinstance(value, list) and value and isinstance(value[0], dict)):
            return gradient(value, t)
        for choice in value:
            if choice.get("filter", "*") == "*" or choice["filter"] in name:
                return gradient(choice["value"], t)
    return None


def layers(name: str) -> int:
    """The number of decoder layers of a model."""
    return 1 + max(int(m[1]) for key in model(name) if (m := re.match(r"model\.layers\.(\d+)\.", key)))


def entries(recipe: dict[str, Any]) -> Iterator[Entry]:
    """Every tensor the recipe writes. All models of a case share one architecture: embedding, layers, norm, head."""
    slices = recipe.get("slices")
    if slices is None:
        first = recipe["models"][0]["model"]
        slices = [{"sources": [{**m, "layer_range": [0, layers(first)]} for m in recipe["models"]]}]
    position = 0
    for number, piece in enumerate(slices):
        start, stop = piece["sources"][0]["layer_range"]
        names = [n for n in model(piece["sources"][0]["model"]) if n.startswith(f"model.layers.{start}.")]
        for offset in range(stop - start):
            t = offset / (stop - start - 1) if stop - start > 1 else 1.0
            for name in names:
                suffix = name.split(".", 3)[3]
                sources = [f"model.layers.{s['layer_range'][0] + offset}.{suffix}" for s in piece["sources"]]
                yield entry(recipe, piece, f"model.layers.{position + offset}.{suffix}", sources, t)
        position += stop - start
        for name in model(piece["sources"][0]["model"]):
            outside = None if name.startswith("model.layers.") else "before" if "embed" in name else "after"
            if (outside == "before" and number == 0) or (outside == "after" and number == len(slices) - 1):
                yield entry(recipe, piece, name, [name] * len(piece["sources"]), 0.0)


def entry(recipe: dict[str, Any], piece: dict[str, Any], name: str, sources: list[str], t: float) -> Entry:
    """The output tensor `name` of one slice, from the tensors named `sources` of the slice's models."""
    base_model = recipe.get("base_model")
    general = [level.get("parameters", {}) for level in (piece, recipe)]
    inputs = [pair for pair in zip(piece["sources"], sources, strict=True) if pair[0]["model"] != base_model]
    parameters: dict[str, Any] = {}
    for key in inspect.signature(REFERENCE[recipe["merge_method"]]).parameters:
        if key in ("models", "base", "keep"):
            continue
        recipe_key = "lambda" if key == "lambda_" else key
        if key in PER_MODEL:
            values = [setting([s.get("parameters", {}), *general], key, n, t) for s, n in inputs]
        else:
            values = setting(general, recipe_key, name, t)
        if values is not None and values != [None] * len(inputs):
            parameters[key] = values
    base_name = next((n for s, n in zip(piece["sources"], sources, strict=True) if s["model"] == base_model), name)
    base = model(base_model)[base_name] if base_model else None
    return Entry(name, [model(s["model"])[n] for s, n in inputs], base, parameters)


def read_recipe(case: str) -> dict[str, Any]:
    return YAML(typ="safe").load(DATA / "cases" / case / "recipe.yml")


# What the goldens do not decide.


class Chosen:
    """Of the entries that equal the cut, all or none are kept, as said for each model."""

    def __init__(self, kept: tuple[bool, ...]) -> None:
        self.kept = kept

    def uniform(self, model_index: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, 0.0 if self.kept[model_index] else 1.0 - 2**-53)


def at_the_cut(item: Entry) -> np.ndarray:
    """ties: the entries whose abs(delta) equals the cut, the K-th largest magnitude, of their model.

    Zeros are not among them: where the cut is 0, keeping them or not is the same.
    """
    exempt = np.zeros(item.models[0].shape, bool)
    for x, density in zip(item.models, item.parameters["density"], strict=True):
        magnitude = np.abs(x - item.base)
        cut = np.sort(magnitude.ravel())[-max(1, int(density * magnitude.size))]
        exempt |= (magnitude == cut) & (cut > 0.0)
    return exempt


def near_the_threshold(item: Entry) -> np.ndarray:
    """arcee_fusion: the entries whose importance is within 1 % of the threshold."""
    x, b = item.models[0].astype(np.float64), item.base.astype(np.float64)
    score = importance(x, b, (item.models[0] - item.base).astype(np.float64))
    return np.abs(score - threshold(score)) <= 0.01 * threshold(score)


EXEMPT = {"bf16-ties": at_the_cut, "arcee-fusion": near_the_threshold}


@pytest.mark.parametrize("case", CASES)
def test_reference_reproduces_the_golden_case(case: str) -> None:
    recipe = read_recipe(case)
    expected = load(DATA / "cases" / case / "expected.safetensors")
    share = 5e-3 if recipe.get("out_dtype") == "bfloat16" else 1e-5
    keep = Chosen((False, False)) if case == "bf16-ties" else None
    seen = set()
    for item in entries(recipe):
        got = REFERENCE[recipe["merge_method"]](item.models, item.base, keep=keep, **item.parameters)
        want = expected[item.name].astype(np.float64)
        assert got.dtype == np.float64
        assert got.shape == want.shape
        largest = np.abs(want).max()
        wrong = np.abs(got - want) > share * (largest if largest > 0.0 else 1.0)
        if case in EXEMPT:
            wrong &= ~EXEMPT[case](item)
        assert not wrong.any(), f"{item.name}: {wrong.sum()} of {wrong.size}, off by {np.abs(got - want)[wrong].max()}"
        seen.add(item.name)
    assert seen == set(expected)


def test_every_recipe_key_is_used() -> None:
    """The resolver above overlooks no parameter of any recipe."""
    for case in CASES:
        recipe = read_recipe(case)
        levels = [recipe, *recipe.get("models", []), *recipe.get("slices", [])]
        levels += [source for piece in recipe.get("slices", []) for source in piece["sources"]]
        known = set(inspect.signature(REFERENCE[recipe["merge_method"]]).parameters)
        for level in levels:
            assert {RENAMED.get(key, key) for key in level.get("parameters", {})} <= known, case


def test_ties_at_the_cut_are_one_of_the_possible_choices() -> None:
    """bf16-ties: what MergeKit wrote at an exempt entry is what keeping or dropping it in each model gives."""
    expected = load(DATA / "cases" / "bf16-ties" / "expected.safetensors")
    exempt = 0
    for item in entries(read_recipe("bf16-ties")):
        want = expected[item.name].astype(np.float64)
        choices = [Chosen((first, second)) for first in (False, True) for second in (False, True)]
        got = [REFERENCE["ties"](item.models, item.base, keep=keep, **item.parameters) for keep in choices]
        assert (np.abs(np.stack(got) - want).min(axis=0) <= 5e-3 * np.abs(want).max()).all(), item.name
        exempt += int(at_the_cut(item).sum())
    assert exempt > 0


def test_few_exempt_fusion_entries_differ() -> None:
    """arcee-fusion: at most 12 of 56 352 decisions differ; every entry is the base's or the model's."""
    expected = load(DATA / "cases" / "arcee-fusion" / "expected.safetensors")
    differ = total = 0
    for item in entries(read_recipe("arcee-fusion")):
        want = expected[item.name].astype(np.float64)
        tolerance = 1e-5 * np.abs(want).max()
        got = REFERENCE["arcee_fusion"](item.models, item.base)
        differ += int(np.sum(np.abs(got - want) > tolerance))
        total += got.size
        assert (np.minimum(np.abs(want - item.base), np.abs(want - item.models[0])) <= tolerance).all(), item.name
    assert total == 56352
    assert differ <= 12
