"""Declarations: what a field accepts, what `register` reads from a class and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.methods import api
from smelt.methods.api import Array, Grain, KthLargest, Method, Sum, derive, per_model, reduce, register, scalar
from smelt.methods.fields import Field, Interval, required


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers are gone after it."""
    api.names()
    monkeypatch.setattr(api, "_REGISTRY", dict(api._REGISTRY))


# Fields


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("[0, 1]", [0.0, 0.5, 1.0], [-1e-9, 1.1]),
        ("(0, 1)", [0.5], [0.0, 1.0]),
        ("(0, 1]", [1.0], [0.0]),
        ("[0, inf)", [0.0, 1e300], [-1.0, np.inf]),
        ("(-inf, 2)", [-1e300, 1.0], [2.0]),
    ],
)
def test_intervals(text: str, inside: list[float], outside: list[float]) -> None:
    interval = Interval.parse(text)
    assert interval.text == text
    assert all(interval.holds(value) for value in inside)
    assert not any(interval.holds(value) for value in outside)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("float", 1, 1.0),
        ("float", "1e-5", 1e-5),
        ("float", "0.5", 0.5),
        ("int", 3, 3),
        ("int", 3.0, 3),
        ("int", "3", 3),
        ("bool", True, True),
        ("bool", 1, True),
        ("bool", 0.0, False),
    ],
)
def test_values_come_in_their_type(kind: Any, given: object, expected: object) -> None:
    found = Field(required, False, "", kind=kind).check(given)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("float", "a"),
        ("float", True),
        ("float", float("nan")),
        ("float", "inf"),
        ("float", None),
        ("float", [1.0]),
        ("int", 1.5),
        ("int", True),
        ("bool", 2),
        ("bool", "maybe"),
        ("bool", None),
    ],
)
def test_wrong_values_are_refused_with_what_was_expected(kind: Any, given: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        Field(required, False, "", kind=kind).check(given)


def test_ranges_and_words() -> None:
    field = Field(True, False, "", words=("density",), kind="bool")
    assert field.check("density") == "density"
    with pytest.raises(ValueError, match="'density'"):
        field.check("densities")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Field(1.0, False, "", Interval.parse("[0, 1]")).check(2)
    assert Field(required, False, "").is_required
    assert not Field(None, False, "").is_required


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_and_its_text_are_the_same(number: float) -> None:
    field = Field(required, False, "")
    assert field.check(number) == number
    assert field.check(repr(number)) == number


# What register reads


class Example(Method):
    """Say what it is."""

    ignored = {"old": "no effect here"}  # noqa: RUF012
    models = (2, 3)

    weight: Array = per_model(required, doc="a number for each model")
    lambda_: float = scalar(1.0, name="lambda", doc="a number")
    count: int = scalar(3, doc="a whole number", within="[1, 9]")
    mode: bool | str = scalar(False, words=("half",), doc="a switch, or half")

    @reduce(Sum, when=lambda method: method.mode is True)
    def total(self, deltas: Array) -> Array:
        return abs(deltas)

    @reduce(KthLargest)
    def cut(self, deltas: Array, total: Array, size: int) -> Any:
        return abs(deltas), np.ones(len(deltas))

    @derive
    def factor(self, total: Array, cut: Any) -> Array:
        return total

    def tile(self, base: Array, deltas: Array, factor: Array) -> Array:
        return base


def test_what_is_read() -> None:
    info = register("example", source="a paper")(Example).info
    assert api.get("example") is info
    assert (info.name, info.source, info.summary) == ("example", "a paper", "Say what it is.")
    assert list(info.fields) == ["weight", "lambda", "count", "mode"]
    assert [field.kind for field in info.fields.values()] == ["float", "float", "int", "bool"]
    assert info.fields["lambda"].attribute == "lambda_"
    assert info.fields["weight"].per_model
    assert info.base == "required"
    assert info.arity() == "2 to 3 models"
    assert set(info.ignored) == {"int8_mask", "old"}
    assert info.tile_arguments == ("base", "deltas", "factor")
    assert [step.arguments for step in info.reductions] == [("deltas",), ("deltas", "total", "size")]


def test_settings_become_attributes() -> None:
    register("example", source="a paper")(Example)
    values = {"weight": (0.25, 2.0), "lambda": 0.3, "count": 4, "mode": True}
    method: Any = Example(values, models=2)
    assert method.weight.dtype == np.float64
    assert method.weight.tolist() == [[0.25], [2.0]]
    assert (method.lambda_, method.count, method.mode, method.n) == (0.3, 4, True, 2)
    assert [step.name for step in method.active()] == ["total", "cut"]
    assert [step.name for step in Example({**values, "mode": "half"}, models=2).active()] == ["cut"]
    with pytest.raises(ValueError, match="one number per model"):
        Example(values, models=3)


@pytest.mark.parametrize(("models", "words"), [((1, 1), "exactly 1 model"), ((2, 2), "exactly 2 models")])
def test_arity_in_words(models: tuple[int, int], words: str) -> None:
    register("example", source="")(Example)
    assert api.replace(Example.info, models=models).arity() == words
    assert api.replace(Example.info, models=(1, None)).arity() == "at least 1 model"
    assert api.replace(Example.info, models=(2, None)).arity() == "at least 2 models"


def test_what_is_asked_for_tells_the_use_of_a_base() -> None:
    class WithoutBase(Method):
        def tile(self, x: Array) -> Array:
            return x[0]

    class Optional(Method):
        def tile(self, vectors: Array, base: Array | None) -> Array:
            return vectors[0]

    class Needed(Method):
        @reduce(Sum)
        def length(self, deltas: Array) -> Array:
            return deltas

        def tile(self, x: Array, length: Array) -> Array:
            return x[0]

    found = [
        register(f"example {i}", source="")(one).info.base for i, one in enumerate((WithoutBase, Optional, Needed))
    ]
    assert found == ["none", "optional", "required"]


def test_tiles_have_their_dimensions() -> None:
    class Rows(Method):
        weight: Array = per_model(1.0, doc="a number")

        @property
        def grain(self) -> Grain:
            return Grain.ROW

        def tile(self, x: Array) -> Array:
            return x[0]

    register("example rows", source="")(Rows)
    assert Rows({"weight": (1.0, 2.0)}, models=2).weight.shape == (2, 1, 1)  # type: ignore[attr-defined]


def test_what_nothing_provides_is_refused() -> None:
    class Unknown(Method):
        def tile(self, x: Array, luck: Array) -> Array:
            return x[0]

    class Late(Method):
        @reduce(Sum)
        def first(self, x: Array, second: Array) -> Array:
            return x

        @reduce(Sum)
        def second(self, x: Array) -> Array:
            return x

        def tile(self, x: Array, first: Array) -> Array:
            return x[0]

    class Untyped(Method):
        size: str = scalar("a", doc="a text")

        def tile(self, x: Array) -> Array:
            return x[0]

    with pytest.raises(TypeError, match="luck"):
        register("unknown", source="")(Unknown)
    with pytest.raises(TypeError, match="second"):
        register("late", source="")(Late)
    with pytest.raises(TypeError, match="size"):
        register("untyped", source="")(Untyped)


def test_two_methods_cannot_share_a_name() -> None:
    class Other(Method):
        def tile(self, x: Array) -> Array:
            return x[0]

    with pytest.raises(TypeError, match="linear"):
        register("linear", source="")(Other)


def test_names() -> None:
    assert api.names() == sorted(api.names())
    assert {"linear", "slerp", "ties"} <= set(api.names())
    with pytest.raises(KeyError):
        api.get("no such method")
