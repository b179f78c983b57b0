"""What a method says of itself: the sections are there, the example runs, and no word of it is out of date."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from conformance.draws import NAMES
from smelt.dtypes import BY_NAME
from smelt.merging import merge
from smelt.methods import api
from smelt.recipe.parse import parse
from smelt.specs import Grain

DATA = Path(__file__).parents[1] / "golden" / "data"
SECTIONS = ("Equation:", "Use it", "Example:")
PARAMETERS = {name for method in NAMES for name in (*api.get(method).fields, *api.get(method).ignored)}

TELLING = {name for name in PARAMETERS if "_" in name}
"""Parameter names that cannot be anything else in a sentence."""


def section(doc: str, heading: str) -> str:
    """The text of a section, from its heading to the next one, without the heading."""
    tail = doc[doc.index(heading) + len(heading) :]
    return re.split(r"\n(?=(?:Equation:|Use it|Note:|Example:))", tail)[0]


def example(method: str) -> str:
    return textwrap.dedent(section(api.get(method).doc, "Example:").strip("\n")) + "\n"


@pytest.mark.parametrize("method", NAMES)
def test_sections(method: str) -> None:
    info = api.get(method)
    assert info.source
    assert 20 < len(info.summary) < 220
    assert info.summary.endswith(".")
    assert not info.summary.startswith(SECTIONS)
    places = [info.doc.find(f"\n{heading}") for heading in SECTIONS]
    assert -1 not in places, f"{method} lacks one of {SECTIONS}"
    assert places == sorted(places)
    for heading in SECTIONS:
        assert section(info.doc, heading).strip()


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in NAMES for name in api.get(method).fields])
def test_every_parameter_has_a_doc(method: str, name: str) -> None:
    field = api.get(method).fields[name]
    assert len(field.doc) > 8
    assert not field.doc.endswith(".")
    if not field.is_required:
        assert field.check(field.default) == field.default


@pytest.mark.parametrize("method", NAMES)
def test_parameters_with_an_option_name_it(method: str) -> None:
    """Words that a parameter takes beside its values are explained where it is declared."""
    for field in api.get(method).fields.values():
        for word in field.words:
            assert re.search(rf"\b{word}\b", field.doc), (field.name, word)


@pytest.mark.parametrize("method", NAMES)
def test_no_parameter_is_mentioned_that_is_not_declared(method: str) -> None:
    """Names with an underscore, names in backticks, and `name: value` outside the example."""
    info = api.get(method)
    declared = {*info.fields, *info.ignored}
    text = info.doc[: info.doc.index("\nExample:")]
    mentioned = {name for name in TELLING if re.search(rf"\b{name}\b", text)}
    mentioned |= {name for name in re.findall(r"`(\w+)`", text) if name in PARAMETERS}
    mentioned |= {name for name in re.findall(r"\b(\w+): (?:true|false|density|[-\d.])", text) if name in PARAMETERS}
    assert mentioned <= declared


@pytest.mark.parametrize("method", NAMES)
def test_ignored_parameters_have_a_reason(method: str) -> None:
    info = api.get(method)
    assert not set(info.ignored) & set(info.fields)
    assert all(len(reason) > 8 for reason in info.ignored.values())


@pytest.mark.parametrize("method", NAMES)
def test_the_example_runs(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    recipe = parse(example(method), source="example")
    assert recipe.merge_method == method
    report = merge(recipe, tmp_path / "out")
    assert report.warnings == ()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == {entry.name for entry in report.plan.entries}
    assert all(np.isfinite(tensor).all() for tensor in written.values())
    assert all(tensor.dtype.name in BY_NAME for tensor in written.values())


@pytest.mark.parametrize("method", NAMES)
def test_the_declaration_is_sound(method: str) -> None:
    info = api.get(method)
    low, high = info.models
    assert low >= 1
    assert high is None or high >= low
    values = {
        name: ((0.5,) * low if field.per_model else 0.5) if field.is_required else field.default
        for name, field in info.fields.items()
    }
    values = {name: (v,) * low if info.fields[name].per_model and np.ndim(v) == 0 else v for name, v in values.items()}
    bound = info.type(values, models=low)
    assert isinstance(bound.grain, Grain)
    bound.check()
    assert info.arity()
