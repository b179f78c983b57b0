"""LiNeS: where a tensor stands between input and output, and what that makes of `lambda`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import SmeltError
from smelt.in_memory import merge_state_dicts
from smelt.planning.anatomy import Part, Role
from smelt.planning.explain import explanation
from smelt.planning.lines import depth
from smelt.recipe.canonical import canonical, digest
from smelt.recipe.parse import parse

DATA = Path(__file__).parents[2] / "golden" / "data"
RECIPE = """\
merge_method: {method}
base_model: models/llama-base
{models}
parameters: {{{parameters}}}
{lines}
"""
TWO = "models: [{model: models/llama-ft1}, {model: models/llama-ft2}]"
LINES = "lines: {alpha: 0.25, beta: 1.5}"


def planned(monkeypatch: pytest.MonkeyPatch, **parts: str) -> smelt.Plan:
    monkeypatch.chdir(DATA)
    given = {"method": "task_arithmetic", "models": TWO, "parameters": "weight: 0.5", "lines": LINES, **parts}
    return smelt.plan(parse(RECIPE.format(**given), source="r.yml"))


def lambdas(plan: smelt.Plan) -> dict[str, float]:
    return {entry.name: entry.values["lambda"] for entry in plan.entries}


@pytest.mark.parametrize(
    ("role", "stack", "layer", "expected"),
    [
        (Role.EMBEDDING, None, None, 0.0),
        (Role.BEFORE, None, None, 0.0),
        (Role.AFTER, None, None, 1.0),
        (Role.HEAD, None, None, 1.0),
        (Role.LAYER, "layers", 0, 0.0),
        (Role.LAYER, "layers", 1, 0.25),
        (Role.LAYER, "layers", 4, 1.0),
        (Role.LAYER, "single", 0, 1.0),
    ],
)
def test_depth(role: Role, stack: str | None, layer: int | None, expected: float) -> None:
    assert depth(Part(role, stack, layer, "w"), {"layers": 5, "single": 1}) == expected


def test_every_layer_has_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lambdas(planned(monkeypatch))
    assert found["model.embed_tokens.weight"] == 0.25
    layers = [found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(4)]
    assert layers == pytest.approx([0.25, 0.75, 1.25, 1.75])
    assert found["model.norm.weight"] == found["lm_head.weight"] == 1.75


def test_it_multiplies_what_the_recipe_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, parameters="weight: 0.5, lambda: [{filter: mlp, value: [0, 3]}, {value: 2}]")
    found = lambdas(plan)
    assert found["model.layers.1.mlp.up_proj.weight"] == pytest.approx(0.75)
    assert found["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(1.5)
    entry = next(entry for entry in plan.entries if entry.name == "model.layers.1.mlp.up_proj.weight")
    told = explanation(entry, plan)
    assert "lambda = 0.75  recipe, filter: mlp, gradient [0, 3] at 0.3333 -> 1: 1, times lines 0.25" in told
    assert "0.25 + 1.5 · 0.3333 -> 0.75" in told


def test_slices_count_the_layers_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{model: models/{name}, layer_range: {range}}}"
    slices = [
        ", ".join(source.format(name=name, range=span) for name in ("llama-base", "llama-ft1"))
        for span in ("[0, 4]", "[1, 4]")
    ]
    models = "slices: [" + ", ".join(f"{{sources: [{sources}]}}" for sources in slices) + "]"
    found = lambdas(planned(monkeypatch, models=models.replace("{{", "{").replace("}}", "}")))
    got = [found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(7)]
    assert got == pytest.approx([0.25 + 1.5 * layer / 6 for layer in range(7)])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("task_arithmetic", {"weight": [0.7, 0.4]}),
        ("ties", {"weight": [0.7, 0.4], "density": 0.5}),
        ("dare_ties", {"weight": [0.7, 0.4], "density": 0.5}),
        ("consensus", {"agreement": 1}),
        ("pcb", {"density": 0.5}),
    ],
)
def test_the_task_vector_of_each_layer_is_scaled(method: str, settings: dict[str, Any]) -> None:
    """The paper's claim: layers near the input stay nearer to the base, by exactly that line."""
    random = np.random.default_rng(3)
    base = {f"layers.{layer}.mlp.weight": random.normal(size=(40, 30)).astype(np.float32) for layer in range(5)}
    tuned = [
        {name: (value + random.normal(0, 0.1, value.shape)).astype(np.float32) for name, value in base.items()}
        for _ in range(2)
    ]
    plain = merge_state_dicts(tuned, method=method, base=base, **settings)
    got = merge_state_dicts(tuned, method=method, base=base, lines={"alpha": 0.2, "beta": 0.8}, **settings)
    for layer, name in enumerate(base):
        want = (0.2 + 0.2 * layer) * (plain[name].astype(np.float64) - base[name])
        np.testing.assert_allclose(got[name] - base[name], want, atol=2e-6)
    assert (got["layers.4.mlp.weight"] == plain["layers.4.mlp.weight"]).all()


@pytest.mark.parametrize(
    ("lines", "message", "fix"),
    [
        ("lines: {alpha: 1}", "`beta` is missing", "add `beta: ...`, how much more the last layer gets than the first"),
        ("lines: {alpha: 1, beta: [0, 1]}", "a factor of `lines` must be one number, not a list", None),
        ("lines: {alpha: high, beta: 1}", "a factor of `lines` must be one number, not 'high'", None),
        ("lines: {alpha: .nan, beta: 1}", ".nan is not a number that a recipe can hold", "give a finite number"),
        ("lines: {alpha: 1, betta: 1}", "unknown key `betta`", "did you mean `beta`?"),
        ("lines: 0.5", "`lines` must be a mapping (`key: value` lines), not 0.5", None),
    ],
)
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, lines: str, message: str, fix: str | None) -> None:
    with pytest.raises(SmeltError) as caught:
        planned(monkeypatch, lines=lines)
    (problem,) = caught.value.problems
    assert (problem.message, problem.fix) == (message, fix)
    assert problem.where[0].startswith("r.yml:5:")


def test_a_method_without_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SmeltError, match="model_stock has no `lambda`, which `lines` scales by layer") as caught:
        planned(monkeypatch, method="model_stock", parameters="")
    assert "task_arithmetic" in str(caught.value.problems[0].fix)


def test_a_model_without_layers() -> None:
    states = [{"w": np.ones(3, np.float32)}, {"w": np.zeros(3, np.float32)}]
    with pytest.raises(SmeltError, match="`lines` scales by layer, and no layers were found in #2"):
        merge_state_dicts(
            states, method="task_arithmetic", base=states[1], weight=1.0, lines={"alpha": 0.5, "beta": 0.5}
        )


def test_written_back() -> None:
    plain, scaled = (
        parse(RECIPE.format(method="ties", models=TWO, parameters="weight: 1", lines=lines))
        for lines in ("", 'lines: {alpha: "1e-1", beta: 1}')
    )
    assert "lines" not in canonical(plain)
    assert canonical(scaled)["lines"] == {"alpha": 0.1, "beta": 1}
    assert digest(plain) != digest(scaled)
