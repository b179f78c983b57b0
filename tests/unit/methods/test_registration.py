"""What `register` makes of a class: kinds, names, the use of a base, dimensions; and classes that it refuses."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from smelt.methods import api
from smelt.methods.api import Array, Grain, Gram, Method, Sum, derive, per_model, reduce, register, scalar


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers are gone after it."""
    api.names()
    monkeypatch.setattr(api, "_REGISTRY", dict(api._REGISTRY))


class First(Method):
    """Take the first model
    as it is.

    Nothing else is read.
    """

    weight: Array = per_model(1.0, doc="a number")

    def tile(self, x: Array) -> Array:
        return x[0]


# Classes that are refused


@pytest.mark.parametrize("given", [42, int, "First", len])
def test_only_methods_are_registered(given: Any) -> None:
    with pytest.raises(TypeError, match=r"is no Method: write `class Mine\(Method\):`"):
        register("mine", source="")(given)


def test_a_method_needs_a_tile() -> None:
    class Without(Method):
        pass

    class NoFunction(Method):
        tile = 3

    for one in (Without, NoFunction):
        with pytest.raises(TypeError, match="has no function `tile"):
            register("mine", source="")(one)


def test_derived_values_come_after_reductions_and_in_order() -> None:
    class Backwards(Method):
        @derive
        def second(self, first: float) -> float:
            return first

        @derive
        def first(self) -> float:
            return 1.0

        def tile(self, x: Array, second: float) -> Array:
            return x[0]

    class Mixed(Method):
        @derive
        def factor(self) -> float:
            return 1.0

        @reduce(Sum)
        def total(self, x: Array, factor: float) -> Array:
            return x

        def tile(self, x: Array, total: Array) -> Array:
            return x[0]

    with pytest.raises(TypeError, match=r"mine.second asks for \['first'\]"):
        register("mine", source="")(Backwards)
    with pytest.raises(TypeError, match=r"mine.total asks for \['factor'\]"):
        register("mine", source="")(Mixed)


def test_derived_values_may_use_earlier_ones() -> None:
    class Forwards(Method):
        @derive
        def first(self) -> float:
            return 1.0

        @derive
        def second(self, first: float) -> float:
            return first

        def tile(self, x: Array, second: float) -> Array:
            return x[0]

    assert [step.name for step in register("mine", source="")(Forwards).info.derived] == ["first", "second"]


def test_a_name_may_be_registered_again_from_the_same_module() -> None:
    class Again(Method):
        def tile(self, x: Array) -> Array:
            return x[0]

    register("mine", source="")(First)
    assert register("mine", source="")(Again) is Again
    assert api.get("mine").type is Again
    api.forget("mine")
    api.forget("mine")
    assert "mine" not in api.names()


# What is read


def test_texts() -> None:
    info = register("mine", source="a paper")(First).info
    assert info.summary == "Take the first model as it is."
    assert info.doc == inspect.getdoc(First)
    assert info.ignored.keys() == {"int8_mask"}


def test_kinds_and_names() -> None:
    class Kinds(Method):
        plain: float = scalar(1.0, doc="a number")
        maybe: int | None = scalar(None, doc="a whole number, or none")
        switch: bool | str = scalar(False, doc="a switch, or a word", words=("half",))
        each: int = per_model(1, doc="per-model numbers are always of kind float")
        from_: float = scalar(1.0, doc="a Python keyword with a line after it")
        other_: float = scalar(1.0, name="else", doc="a name of its own")

        def tile(self, x: Array) -> Array:
            return x[0]

    fields = register("mine", source="")(Kinds).info.fields
    assert {name: field.kind for name, field in fields.items()} == {
        "plain": "float",
        "maybe": "int",
        "switch": "bool",
        "each": "float",
        "from": "float",
        "else": "float",
    }
    assert {name: field.attribute for name, field in fields.items() if field.attribute != name} == {
        "from": "from_",
        "else": "other_",
    }


def test_reductions_are_of_the_whole_tensor_and_always_needed_unless_they_say_otherwise() -> None:
    class Two(Method):
        @reduce(Sum)
        def first(self, x: Array) -> Array:
            return x

        @reduce(Gram, scope="column", when=lambda method: False)
        def second(self, x: Array) -> Array:
            return x

        def tile(self, x: Array, first: Array) -> Array:
            return x[0]

    register("mine", source="")(Two)
    assert [(r.name, r.reducer, r.scope) for r in Two.info.reductions] == [
        ("first", Sum, "tensor"),
        ("second", Gram, "column"),
    ]
    assert [reduction.name for reduction in Two({}, models=1).active()] == ["first"]


def only_vectors(self: Any, vectors: Array) -> Array:
    return vectors[0]


def a_base_or_none(self: Any, x: Array, base: Array | None) -> Array:
    return x[0]


def a_base(self: Any, x: Array, base: Array) -> Array:
    return base


def deltas(self: Any, deltas: Array) -> Array:
    return deltas[0]


def neither(self: Any, x: Array) -> Array:
    return x[0]


@pytest.mark.parametrize(
    ("tile", "use"),
    [
        (neither, "none"),
        (only_vectors, "optional"),
        (a_base_or_none, "optional"),
        (a_base, "required"),
        (deltas, "required"),
    ],
)
def test_the_use_of_a_base(tile: Any, use: str) -> None:
    of_tile: Any = type("OfTile", (Method,), {"tile": tile})
    of_reduction: Any = type("OfReduction", (Method,), {"total": reduce(Sum)(tile), "tile": neither})
    assert register("mine", source="")(of_tile).info.base == use
    assert register("mine", source="")(of_reduction).info.base == use


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ((1, 1), "exactly 1 model"),
        ((2, 2), "exactly 2 models"),
        ((1, None), "at least 1 model"),
        ((2, None), "at least 2 models"),
        ((1, 3), "1 to 3 models"),
        ((2, 3), "2 to 3 models"),
    ],
)
def test_arity_in_words(models: tuple[int, int | None], words: str) -> None:
    info = register("mine", source="")(First).info
    assert api.replace(info, models=models).arity() == words


# What an instance is


def test_whole_numbers_become_float64() -> None:
    register("mine", source="")(First)
    weight = First({"weight": (1, 2)}, models=2).weight
    assert weight.dtype == np.float64
    assert weight.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("grain", "shape"), [("ELEMENT", (2, 1)), ("ROW", (2, 1, 1)), ("SLAB", (2, 1, 1)), ("TENSOR", (2,))]
)
def test_numbers_per_model_meet_the_tiles(grain: str, shape: tuple[int, ...]) -> None:
    found: Any = type("Grained", (First,), {"weight": First.weight, "grain": Grain[grain]})
    register("mine", source="")(found)
    assert found({"weight": (1.0, 2.0)}, models=2).weight.shape == shape


def test_grains_are_grains() -> None:
    found: Any = type("Grained", (First,), {"weight": First.weight, "grain": "ROW"})
    register("mine", source="")(found)
    with pytest.raises(TypeError, match="must be a Grain, not 'ROW'"):
        found({"weight": (1.0,)}, models=1)


def test_what_a_method_need_not_say() -> None:
    register("mine", source="")(First)
    method = First({"weight": (1.0,)}, models=1)
    assert method.grain is Grain.ELEMENT
    assert method.copies() is False
    assert method.active() == ()
    assert method.info.models == (1, None)
    method.check()
