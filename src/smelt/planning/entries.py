"""The plan as a value: what every output tensor is made of, with which numbers, and where it is written."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smelt.dtypes import DType
from smelt.planning.anatomy import Part
from smelt.specs import ModelRef, TensorSpec


class Action(enum.Enum):
    """How an output tensor comes about."""

    MERGE = "merge"
    """The method works on float32 values of the inputs."""
    COPY = "copy"
    """The bytes of the one input are the result."""
    EQUAL = "equal"
    """A tensor that cannot be averaged: all inputs must hold the same bytes, which are copied."""


@dataclass(frozen=True, slots=True)
class Input:
    """A stored tensor of one of the plan's models (`model` is its place in `Plan.models`).

    `stream` is which of the random streams is its own: its place among the recipe's models, so that it draws the same
    numbers whether or not another model lacks the tensor.
    """

    model: int
    tensor: TensorSpec
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One output tensor. `values` maps each parameter of the method to a value, or to one number per input.

    `origins` says in words where each of these values was found (recipe level, filter, gradient position).
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    part: Part
    action: Action
    method: str
    inputs: tuple[Input, ...]
    base: Input | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def size(self) -> int:
        return TensorSpec(self.name, self.dtype, self.shape).size

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.size)

    @property
    def sources(self) -> tuple[Input, ...]:
        """Every stored tensor it is made of, the base last."""
        return self.inputs if self.base is None else (*self.inputs, self.base)

    @property
    def input_bytes(self) -> int:
        return sum(source.tensor.nbytes for source in self.sources)


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model of the plan: as the recipe names it, as the output's papers name it, and where it was found.

    A local folder is published by its name alone, a hub model as `org/name` or `org/name@revision`; `repository` is the
    hub's name for it, `commit` what the revision meant. `merged`: it is not stored, but another merge of the recipe.
    """

    ref: ModelRef
    published: str
    place: str
    commit: str | None = None
    repository: str | None = None
    merged: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What a merge will do.

    `donor` is the place in `models` of the model that gives config and tensor names, `tokenizer` the published name of
    the one that gives the tokenizer (it need not be merged). `restacked` holds, for each stack that slices made anew,
    the source layer of every layer.
    """

    method: str
    models: tuple[PlannedModel, ...]
    donor: int
    base: int | None
    entries: tuple[Entry, ...]
    recipe_digest: str
    restacked: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tokenizer: str = ""
    chat_template: str | None = None
    tied: bool = False
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seed: int = 0

    @property
    def output_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def input_bytes(self) -> int:
        """Bytes of the stored tensors that are used, each pass counted once."""
        return sum(entry.input_bytes for entry in self.entries)

    @property
    def parameters(self) -> int:
        return sum(entry.size for entry in self.entries)
