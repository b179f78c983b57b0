"""What a merge method is: parameters declared once, reductions, and a tile function over the array API standard.

A method never sees a device, a file, a thread or a vocabulary. The names of its functions' arguments say what it needs:

| argument | what it is given |
|---|---|
| `x` | the models' values, float32 [n, ...] (the base is not among them) |
| `base` | the base model's values, float32 [...]; annotated `Array | None` where a base is optional |
| `deltas` | x − base, float32 [n, ...] |
| `vectors` | the deltas where there is a base, else the models' values |
| `uniform` | random numbers in [0, 1), float32 [n, ...], a function of (seed, tensor, model, element) alone |
| `size` | the number of elements of the whole tensor; of all tensors where reductions go over the whole model |
| a reduction's or derived value's name | its result |

Tiles are [n, t] for Grain.ELEMENT, [n, r, last] for ROW, [n, r, rest] for SLAB, [n, *shape] for TENSOR. Asking for
`base` or `deltas` makes a base model mandatory.

A parameter `granularity` with the word `model` among its words lets the recipe choose: where it has this value, each
reduction goes over all tensors of the model that have it, before any of them is merged.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from smelt.methods.fields import Field, Kind, per_model, required, scalar
from smelt.methods.reducers import Gram, Sum
from smelt.methods.selection import KthLargest
from smelt.specs import Grain

__all__ = [
    "Array",
    "Cost",
    "Grain",
    "Gram",
    "KthLargest",
    "Method",
    "MethodInfo",
    "Sum",
    "Undefined",
    "derive",
    "get",
    "names",
    "per_model",
    "reduce",
    "register",
    "required",
    "scalar",
]

Array = Any


class Undefined(ValueError):
    """A method's word for a tensor whose result is not defined: inputs that cancel. The engine names the tensor."""


Scope = Literal["tensor", "column"]
GRANULARITY = "granularity"
"""The parameter that says over what a method's reductions go."""
MODEL = "model"
"""Its value where they go over all tensors of the model together."""
BaseUse = Literal["none", "optional", "required"]

_GIVEN = frozenset({"x", "base", "deltas", "vectors", "uniform", "size"})


@dataclass(frozen=True, slots=True)
class Cost:
    """What a tensor costs beyond being read and written: floating-point operations, and bytes that one worker needs."""

    flops: float
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other: the operations of both, the memory of the larger one."""
        return Cost(self.flops + other.flops, max(self.bytes, other.bytes))

    def times(self, count: int) -> Cost:
        """So many of them, one after the other."""
        return Cost(self.flops * count, self.bytes)


@dataclass(frozen=True, slots=True)
class Reduction:
    """A pass that must finish first: `function` gives the values of a tile, `reducer` folds them."""

    name: str
    reducer: type[Any]
    function: Callable[..., Any]
    scope: Scope
    when: Callable[[Any], bool]
    arguments: tuple[str, ...] = ()
    uses: tuple[str, ...] | None = None
    """The settings that the function reads (recipe names); None: any of them may be."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A small value computed once per tensor, after the reductions it names."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """All that a method's declaration says; `methods.api.get(name)` gives it."""

    name: str
    type: type[Method]
    source: str
    summary: str
    doc: str
    fields: dict[str, Field]
    ignored: dict[str, str]
    base: BaseUse
    reductions: tuple[Reduction, ...]
    derived: tuple[Derived, ...]
    tile_arguments: tuple[str, ...]
    models: tuple[int, int | None]

    def arity(self) -> str:
        """How many models it takes, in words: `exactly 2 models`."""
        low, high = self.models
        plural = "" if (high or low) == 1 else "s"
        if high == low:
            return f"exactly {low} model{plural}"
        return f"at least {low} model{'' if low == 1 else 's'}" if high is None else f"{low} to {high} models"


class Method:
    """A merge method with its settings for one tensor. Subclasses declare fields and functions; see `register`.

    `values` maps each field's recipe name to a plain value, or for per-model fields to one number per model; they
    become attributes, per-model ones as float64 arrays [n, 1, ...] with `ndim` dimensions.
    """

    info: ClassVar[MethodInfo]
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """How many models it takes, the base not counted: at least, at most."""
    ignored: ClassVar[dict[str, str]] = {}
    """Parameters that MergeKit's recipes carry for this method and that have no effect, with the reason."""
    copied_bits: ClassVar[int] = 64
    """Elements of at most so many bits are copied where `copies` holds: 32 if arithmetic would round to float32."""
    per_tensor: ClassVar[frozenset[str]] = frozenset()
    """Parameters that no reduction looks at: tensors whose reductions go over the whole model may differ in them."""

    def __init__(self, values: Mapping[str, Any], *, models: int) -> None:
        self.n = models
        for field in self.info.fields.values():
            value = values[field.name]
            if field.per_model:
                value = np.asarray(value, dtype=np.float64)
                if value.shape != (models,):
                    raise ValueError(f"{field.name} needs one number per model")
            setattr(self, field.attribute, value)
        if not isinstance(self.grain, Grain):
            raise TypeError(f"grain must be a Grain, not {self.grain!r}")
        ndim = {Grain.ELEMENT: 2, Grain.ROW: 3, Grain.SLAB: 3, Grain.TENSOR: 0}[self.grain]
        if ndim:
            self.shape_fields(ndim)

    def shape_fields(self, ndim: int) -> None:
        """Give the per-model fields `ndim` dimensions, [n, 1, ...], to meet tiles of that many dimensions."""
        for field in self.info.fields.values():
            if field.per_model:
                value = getattr(self, field.attribute)
                setattr(self, field.attribute, value.reshape((-1,) + (1,) * (ndim - 1)))

    @property
    def grain(self) -> Grain:
        """How its tensors may be cut; may depend on the settings."""
        return Grain.ELEMENT

    def check(self) -> None:
        """Raise ValueError(what, fix) where the settings, each allowed by itself, make no sense together."""

    def copies(self) -> bool:
        """Whether with these settings the result is the first model's tensor as it is, so that bytes can be copied."""
        return False

    def cost(self, shape: tuple[int, ...]) -> Cost | None:
        """What a tensor of this shape costs; None where it is no more than going through it, as for most methods."""
        return None

    def active(self) -> tuple[Reduction, ...]:
        """The reductions that these settings need."""
        return tuple(reduction for reduction in self.info.reductions if reduction.when(self))


def reduce(
    reducer: type[Any],
    *,
    scope: Scope = "tensor",
    when: Callable[[Any], bool] = lambda method: True,
    uses: Sequence[str] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Mark a function of a method as a reduction: it returns the values of a tile that `reducer` folds.

    `when` tells from the settings whether it is needed; where it is not, its result is None. `uses` names the settings
    that the function reads, as recipes call them: a sweep over others makes the reduction once, and shows the function
    no other setting. Without `uses` it is made for each candidate.
    """

    def mark(function: Callable[..., Any]) -> Any:
        named = None if uses is None else tuple(uses)
        return Reduction(function.__name__, reducer, function, scope, when, _arguments(function), named)

    return mark


def derive(function: Callable[..., Any]) -> Any:
    """Mark a function of a method as computed once per tensor, from reductions and earlier derived values.

    It may raise Undefined (the reason) where the result is not defined; the engine adds the tensor's name.
    """
    return Derived(function.__name__, function, _arguments(function))


def _arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


_REGISTRY: dict[str, MethodInfo] = {}
_INFRASTRUCTURE = {"api", "decomposition", "fields", "loading", "reducers", "selection", "stages"}

M = TypeVar("M", bound=Method)


def register(name: str, *, source: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: read the declarations of a Method and make it known under `name`.

    TypeError where the declaration is unsound (an argument that nothing provides, a reduction that waits for itself).
    """

    def read(cls: type[M]) -> type[M]:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise TypeError(f"{getattr(cls, '__name__', cls)} is no Method: write `class {name.title()}(Method):`")
        if not callable(getattr(cls, "tile", None)):
            raise TypeError(f"{cls.__name__} has no function `tile(self, ...)`")
        hints = typing.get_type_hints(cls)
        fields: dict[str, Field] = {}
        for attribute, declared in vars(cls).items():
            if isinstance(declared, Field):
                words = bool(declared.words)
                kind = "float" if declared.per_model else _kind(hints.get(attribute), attribute, words=words)
                field = replace(declared, name=declared.name or attribute.rstrip("_"), attribute=attribute, kind=kind)
                fields[field.name] = field
        reductions = [value for value in vars(cls).values() if isinstance(value, Reduction)]
        derived = [value for value in vars(cls).values() if isinstance(value, Derived)]
        tile = cls.tile  # type: ignore[attr-defined]
        known = set(_GIVEN)
        steps: list[Reduction | Derived] = [*reductions, *derived]
        for step in steps:
            if unknown := set(step.arguments) - known:
                raise TypeError(f"{name}.{step.name} asks for {sorted(unknown)}, which nothing before it provides")
            known.add(step.name)
        for reduction in reductions:
            if unknown := set(reduction.uses or ()) - fields.keys():
                raise TypeError(f"{name}.{reduction.name} uses {sorted(unknown)}, which are no settings of it")
        tile_arguments = _arguments(tile)
        if unknown := set(tile_arguments) - known:
            raise TypeError(f"{name}.tile asks for {sorted(unknown)}, which nothing provides")
        cls.info = MethodInfo(
            name=name,
            type=cls,
            source=source,
            summary=(inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "),
            doc=inspect.getdoc(cls) or "",
            fields=fields,
            ignored={"int8_mask": "masks are never stored here", **cls.ignored},
            base=_base_use([tile, *(reduction.function for reduction in reductions)]),
            reductions=tuple(reductions),
            derived=tuple(derived),
            tile_arguments=tile_arguments,
            models=cls.models,
        )
        if name in _REGISTRY and _REGISTRY[name].type.__module__ != cls.__module__:
            raise TypeError(f"there is a method {name} already, in {_REGISTRY[name].type.__module__}")
        _REGISTRY[name] = cls.info
        return cls

    return read


def _kind(hint: object, attribute: str, *, words: bool) -> Kind:
    plain: dict[object, Kind] = {float: "float", int: "int", bool: "bool"}
    for candidate in (hint, *typing.get_args(hint)):
        if candidate in plain:
            return plain[candidate]
    if hint is str and words:
        return "word"
    raise TypeError(f"field {attribute} must be annotated float, int or bool, or str where it has words")


def _base_use(functions: Sequence[Callable[..., Any]]) -> BaseUse:
    asked = False
    for function in functions:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name == "deltas":
                return "required"
            if parameter.name == "base":
                asked = True
                if "None" not in str(parameter.annotation):
                    return "required"
            if parameter.name == "vectors":
                asked = True
    return "optional" if asked else "none"


@cache
def _discover() -> None:
    package = importlib.import_module("smelt.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _INFRASTRUCTURE:
            importlib.import_module(f"smelt.methods.{module.name}")
    importlib.import_module("smelt.methods.loading").load_entry_points()


def forget(name: str) -> None:
    """Take a method out of the registry."""
    _REGISTRY.pop(name, None)


def names() -> list[str]:
    """Every known method, sorted."""
    _discover()
    return sorted(_REGISTRY)


def get(name: str) -> MethodInfo:
    """The declaration of a method; KeyError if there is none of that name."""
    _discover()
    return _REGISTRY[name]
