"""Recipes as people publish them. Good ones run and their output loads; bad ones get the message written at their top.

recipes/good/*.yml: comments `# warning: ...` name the warnings that the merge gives, all of them.
recipes/bad/*.yml: the comments at the top are the problems, in order: `# error:`, `# at:` (line:column in the file, if
the problem has a place in it), `# fix:` (if there is one). `{models}` stands for the folder of the models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import architectures
import factory
import shelf
import smelt

RECIPES = Path(__file__).parents[1] / "recipes"
GOOD = sorted((RECIPES / "good").glob("*.yml"))
BAD = sorted((RECIPES / "bad").glob("*.yml"))
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shelf.build(tmp_path_factory.mktemp("published"))


def source(path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The text of a recipe, with the models it names at hand and their folder as the working folder."""
    text = path.read_text(encoding="utf-8-sig")
    shelf.add(models, text)
    monkeypatch.chdir(models)
    return text


def key(text: str, name: str) -> str | None:
    """The value of a key at the top of a recipe."""
    found = re.search(rf"^{name}: *(?:torch\.)?([\w.]+)", text, re.M)
    return found[1] if found else None


def test_there_are_enough() -> None:
    """A few dozen, every method among them."""
    from smelt.methods import api

    assert len(GOOD) >= 25
    assert len(BAD) >= 25
    used = {key(path.read_text(encoding="utf-8-sig"), "merge_method") for path in GOOD}
    packaged = {name for name in api.names() if api.get(name).type.__module__.startswith("smelt.methods.")}
    assert used == packaged


# --- good ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good(path: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = source(path, models, monkeypatch)
    out = tmp_path / "out"
    report = smelt.merge(path, out, seed=1)
    expected = re.findall(r"# warning: (.*)", text)
    assert [re.sub(r"^.*\.yml:\d+:\d+: ", "", warning) for warning in report.warnings] == expected
    kind = json.loads((out / "config.json").read_text())["model_type"]
    _, info = architectures.load(kind if kind in architectures.ARCHITECTURES else "llama", out)
    architectures.assert_clean(info)
    merged = factory.stored(out)
    assert all(np.isfinite(value.astype(np.float32)).all() for value in merged.values())
    dtype = key(text, "out_dtype") or key(text, "dtype")
    if dtype is not None:
        assert {value.dtype.name for value in merged.values()} == {dtype}
    if path.stem in EXPECTED:
        _compare(merged, EXPECTED[path.stem], models, dtype)
    checked = factory.smelt("check", path, "--json")
    assert checked.code == 0, checked.text
    assert checked.json["warnings"] == list(report.warnings)
    assert checked.json["tensors"] == len(merged)


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_is_written_back_as_itself(path: Path) -> None:
    """The copy of the recipe beside an output says the same."""
    from smelt.recipe.canonical import canonical, digest, to_yaml
    from smelt.recipe.parse import load, parse

    recipe = load(path)
    assert digest(parse(to_yaml(canonical(recipe)))) == digest(recipe)


def _compare(merged: Tensors, expected: Callable[..., Any], models: Path, dtype: str | None) -> None:
    wanted = expected(lambda name: factory.stored(models / name))
    assert set(merged) == set(wanted)
    bound = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype or "", 1e-6)
    for name, want in wanted.items():
        assert merged[name].shape == want.shape, name
        off = np.abs(merged[name].astype(np.float64) - want)
        assert (off <= bound * np.maximum(np.abs(want), 1e-4) + 1e-7).all(), f"{name}: {off.max()}"


# --- a few of them by hand, in plain float64 ------------------------------------------------------------------------

Models = Callable[[str], Tensors]


def _layer(name: str) -> int | None:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _moved(name: str, layer: int) -> str:
    return re.sub(r"^model\.layers\.\d+\.", f"model.layers.{layer}.", name)


def _slerp(t: float, base: np.ndarray, other: np.ndarray) -> np.ndarray:
    b, x = base.astype(np.float64), other.astype(np.float64)
    cosine = float((b * x).sum() / np.linalg.norm(b) / np.linalg.norm(x))
    if abs(cosine) > 0.9995:
        return (1 - t) * b + t * x
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * b + np.sin(t * angle) * x) / np.sin(angle)


def _stacked(layers: list[tuple[Tensors, int]], before: Tensors, after: Tensors) -> Tensors:
    """A model whose layers are the given layers of the given models."""
    made = {}
    for name, value in before.items():
        if _layer(name) is None:
            made[name] = value if "embed" in name else after[name]
    for place, (model, layer) in enumerate(layers):
        made |= {_moved(name, place): value for name, value in model.items() if _layer(name) == layer}
    return made


def _slerp_gradients(load: Models) -> Tensors:
    chat, code = load("llama-ft1"), load("llama-ft2")

    def t(name: str) -> float:
        place = (_layer(name) or 0) / 3
        if "self_attn" in name:
            return float(np.interp(4 * place, range(5), [0, 0.5, 0.3, 0.7, 1]))
        if "mlp" in name:
            return float(np.interp(4 * place, range(5), [1, 0.5, 0.7, 0.3, 0]))
        return 0.75 if "lm_head" in name else 0.5

    return {name: _slerp(t(name), chat[name], code[name]) for name in chat}


def _one_element_lists(load: Models) -> Tensors:
    base, tuned = load("qwen-base"), load("qwen-ft1")
    return {name: _slerp(0.25 if "layernorm" in name else 0.5, base[name], tuned[name]) for name in base}


def _self_merge(load: Models) -> Tensors:
    model = load("llama-ft1")
    made = _stacked([(model, layer) for layer in (0, 1, 1, 2, 2, 3)], model, model)
    for name in made:
        if _layer(name) in (2, 4) and ("o_proj" in name or "down_proj" in name):
            made[name] = np.zeros_like(made[name])
    return made


def _frankenmerge(load: Models) -> Tensors:
    chat, code, sums = load("llama-ft1"), load("llama-ft2"), load("llama-ft3")
    layers = [(chat, 0), (chat, 1), (chat, 2), (code, 1), (code, 2), (chat, 2), (chat, 3), (sums, 3)]
    return _stacked(layers, chat, sums)


def _normalize_at_several_levels(load: Models) -> Tensors:
    one, two = load("llama-ft1"), load("llama-ft2")
    made = {}
    for name in one:
        # the embedding comes with the first slice, the norm and the head with the last
        summed = name == "model.embed_tokens.weight" or _layer(name) in (0, 1)
        first, second = (0.5, 0.75) if summed else (0.5, 0.5)
        made[name] = first * one[name].astype(np.float64) + second * two[name]
    return made


def _base_model_per_slice(load: Models) -> Tensors:
    one, two = load("llama-ft1"), load("llama-ft2")
    first = {name: name == "model.embed_tokens.weight" or _layer(name) in (0, 1) for name in one}
    return {name: _slerp(0.25 if first[name] else 0.75, one[name], two[name]) for name in one}


def _forgetting(load: Models) -> Tensors:
    base, one, three = (load(name) for name in ("llama-base", "llama-ft1", "llama-ft3"))
    wide = {name: value.astype(np.float64) for name, value in base.items()}
    return {n: b + 0.9 * (0.8 * (one[n] - base[n]) - 0.4 * (three[n] - base[n])) for n, b in wide.items()}


def _twice_in_a_slice(load: Models) -> Tensors:
    model = load("llama-ft1")
    made = _stacked([(model, layer) for layer in (0, 1, 1, 2, 3)], model, model)
    for name in made:
        if _layer(name) == 2:
            made[name] = (made[name].astype(np.float64) + model[name]) / 2
    return made


def _extrapolated(load: Models) -> Tensors:
    base, one = load("llama-base"), load("llama-ft1")
    return {name: 1.5 * one[name].astype(np.float64) - 0.5 * base[name] for name in base}


def _scaled_attention(load: Models) -> Tensors:
    model = load("llama-ft2")
    scale = [1.0, 1.0, 0.9, 0.8]
    return {name: value * (scale[_layer(name) or 0] if "self_attn" in name else 1.0) for name, value in model.items()}


def _mean(*names: str) -> Callable[[Models], Tensors]:
    def of(load: Models) -> Tensors:
        loaded = [load(name) for name in names]
        return {name: np.mean([model[name].astype(np.float64) for model in loaded], axis=0) for name in loaded[0]}

    return of


def _text_only(load: Models) -> Tensors:
    base, one, two = (load(name) for name in ("tiny-vl", "tiny-vl-tuned-1", "tiny-vl-tuned-2"))
    return {
        name: value if "visual" in name else 0.75 * one[name].astype(np.float64) + 0.25 * two[name]
        for name, value in base.items()
    }


def _encoder_and_decoder(load: Models) -> Tensors:
    base, one, two = (load(name) for name in ("tiny-t5", "tiny-t5-tuned-1", "tiny-t5-tuned-2"))
    made = {}
    for name, b in base.items():
        if name.startswith("encoder."):
            made[name] = one[name]
        elif name.startswith("decoder."):
            made[name] = b.astype(np.float64) + 0.5 * (one[name] - b) + 0.5 * (two[name] - b)
        else:
            made[name] = b  # the embedding, shared by both, belongs to none
    return made


EXPECTED: dict[str, Callable[[Models], Tensors]] = {
    "slerp-gradients-per-filter": _slerp_gradients,
    "slerp-one-element-lists": _one_element_lists,
    "self-merge-in-five-slices": _self_merge,
    "frankenmerge-overlapping": _frankenmerge,
    "normalize-at-several-levels": _normalize_at_several_levels,
    "base-model-per-slice": _base_model_per_slice,
    "task-arithmetic-forgetting": _forgetting,
    "same-model-twice-in-a-slice": _twice_in_a_slice,
    "negative-and-unnormalised": _extrapolated,
    "passthrough-filters-by-model": _scaled_attention,
    "models-by-name-only": _mean("llama-ft1", "llama-ft2", "llama-ft3"),
    "document-markers": _mean("llama-ft1", "llama-ft2"),
    "references-as-mappings": _mean("llama-ft1", "llama-ft2"),
    "windows-line-ends-and-bom": _mean("llama-ft1", "llama-ft2"),
    "vision-language-text-only": _text_only,
    "t5-encoder-and-decoder": _encoder_and_decoder,
}


def test_an_up_scaled_model_begins_as_the_model_it_came_from(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the comment in the recipe says: layers with o_proj and down_proj at zero are the identity."""
    import torch

    monkeypatch.chdir(models)
    smelt.merge(RECIPES / "good" / "self-merge-in-five-slices.yml", tmp_path / "deep")
    smelt.merge(factory.linear("llama-ft1", dtype="bfloat16"), tmp_path / "plain")
    tokens = torch.arange(3, 40)[None]
    deep, plain = (architectures.load("llama", tmp_path / name)[0](tokens).logits for name in ("deep", "plain"))
    assert torch.equal(deep, plain)


def test_a_base_with_parameters_is_the_base_all_the_same(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight on the listed base has no effect, and a note says so."""
    path = RECIPES / "good" / "base-listed-with-parameters.yml"
    monkeypatch.chdir(models)
    report = smelt.merge(path, tmp_path / "one")
    assert any("`weight`, `density` of llama-base has no effect: it is the base" in n for n in report.plan.notes)
    lines = path.read_text().splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if "of no effect" in line) - 1
    plain = tmp_path / "plain.yml"
    plain.write_text("".join(lines[:start] + lines[start + 3 :]))
    assert "of no effect" not in plain.read_text()
    smelt.merge(plain, tmp_path / "two")
    one, two = factory.stored(tmp_path / "one"), factory.stored(tmp_path / "two")
    assert {name: value.tobytes() for name, value in one.items()} == {name: v.tobytes() for name, v in two.items()}


def test_auto_takes_the_template_that_most_models_carry(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    smelt.merge(RECIPES / "good" / "chat-template-auto.yml", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == shelf.COMMON_TEMPLATE
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


# --- bad ones -------------------------------------------------------------------------------------------------------


def stated(text: str) -> list[dict[str, str]]:
    """The problems that the comments at the top of a bad recipe state."""
    problems: list[dict[str, str]] = []
    for line in text.splitlines():
        found = re.match(r"# (error|at|fix): (.*)", line)
        if found is None:
            break
        if found[1] == "error":
            problems.append({})
        problems[-1][found[1]] = found[2]
    return problems


def given(problems: list[dict[str, Any]], models: Path) -> list[dict[str, str]]:
    """The problems of a command's JSON in the form of `stated`."""
    told = []
    for problem in problems:
        place = re.search(r"\.yml:(\d+:\d+)$", problem["where"][0]) if problem["where"] else None
        one = {"error": problem["message"], "at": place[1] if place else None, "fix": problem["fix"]}
        told.append({name: value.replace(str(models), "{models}") for name, value in one.items() if value is not None})
    return told


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_bad(path: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = source(path, models, monkeypatch)
    expected = stated(text)
    assert expected, "the comments at the top state no error"
    merged = factory.smelt("merge", path, tmp_path / "out", "--json")
    assert given(merged.json["problems"], models) == expected
    assert merged.code == merged.json["exit_code"] in (2, 3)
    assert list(tmp_path.iterdir()) == []
    for command in ("plan", "check"):
        assert factory.smelt(command, path, "--json").out == merged.out
    printed = factory.smelt("check", path)
    assert printed.out == ""
    assert all(f"error: {problem['error']}" in printed.err for problem in expected)
    assert all(problem["where"] or problem["fix"] for problem in merged.json["problems"])
