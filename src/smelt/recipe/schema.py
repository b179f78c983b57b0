"""The recipe language: MergeKit's YAML, strict, with a few keys more: `merges`, `methods`, `missing`, `match:`.

These records hold what a recipe says and no defaults of methods. `parse.parse`, `parse.load` and `parse.from_dict` make
them; that is where problems are put into words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    WithJsonSchema,
)

from smelt.dtypes import OUTPUT_NAMES
from smelt.errors import nearest
from smelt.recipe.document import Document, KeyPath
from smelt.recipe.faults import Fault, describe, refuse
from smelt.recipe.references import ModelName, read_model_name
from smelt.recipe.settings import Case, Conditional, Gradient, Scalar, Setting, read_boolean, read_setting

__all__ = [
    "Block",
    "Case",
    "Conditional",
    "Gradient",
    "Lines",
    "ModelName",
    "Module",
    "Recipe",
    "Scalar",
    "Scope",
    "Setting",
    "Slice",
    "Source",
    "Step",
    "TokenRule",
    "TokenSource",
    "Tokenizer",
]

T = TypeVar("T")

_LEGACY_PREFIX = "model:"
"""Early MergeKit recipes wrote `tokenizer_source: model:org/name`."""


def _read_dtype(name: str) -> str:
    name = name.removeprefix("torch.")
    if name not in OUTPUT_NAMES:
        close = nearest(name, OUTPUT_NAMES)
        fix = f"did you mean `{close}`?" if close else f"use one of {', '.join(OUTPUT_NAMES)}"
        refuse([Fault(f"{describe(name)} is no type that a recipe can ask for", fix=fix)])
    return name


def _read_layer_range(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    fix = "write `layer_range: [FIRST, END]`; layer END itself is left out"
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        given = f"a list of {len(value)}" if isinstance(value, (list, tuple)) else describe(value)
        refuse([Fault(f"`layer_range` must be two whole numbers, not {given}", fix=fix)])
    for index, entry in enumerate(value):
        if isinstance(entry, bool) or not isinstance(entry, int):
            refuse([Fault(f"`layer_range` must be two whole numbers, not {describe(entry)}", (index,), fix)])
    first, end = value
    if first < 0:
        refuse([Fault(f"`layer_range` [{first}, {end}] begins before layer 0", fix="count layers from 0")])
    if end <= first:
        what = "is empty" if end == first else "is reversed"
        close = f"did you mean [{end}, {first}]? Layer {first} itself is left out"
        refuse([Fault(f"`layer_range` [{first}, {end}] {what}", fix=fix if end == first else close)])
    return first, end


def _read_vocabulary(value: Any) -> ModelName | str:
    if isinstance(value, str):
        if value in ("union", "base"):
            return value
        return read_model_name(value.removeprefix(_LEGACY_PREFIX))
    return read_model_name(value)


def _or_empty(value: Any) -> Any:
    return {} if value is None else value


_TEXT_OR_NULL = {"type": ["string", "null"]}
_NAME_KEYS: dict[str, Any] = {
    "model": {"type": ["string", "object"]},
    "path": {"type": "string"},
    "revision": _TEXT_OR_NULL,
    "lora": {"type": ["string", "object", "null"]},
    "override_architecture": _TEXT_OR_NULL,
}
_NAME_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "object", "properties": _NAME_KEYS, "additionalProperties": False}]
}
_ROW_KEYS = {"kind": {"enum": ["model_token", "zero"]}, "token_id": {"type": "integer"}, "token": {"type": "string"}}
_ROW_SCHEMA = {"type": "object", "properties": _NAME_KEYS | _ROW_KEYS, "additionalProperties": False}
_RANGE_SCHEMA = {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
_SETTING_SCHEMA = {"anyOf": [{"type": kind} for kind in ("number", "boolean", "string", "array", "object")]}

Many: TypeAlias = Annotated[tuple[T, ...], Field(strict=False, min_length=1)]
Name: TypeAlias = Annotated[ModelName, PlainValidator(read_model_name), WithJsonSchema(_NAME_SCHEMA)]
Parameters: TypeAlias = Annotated[
    dict[str, Annotated[Setting, PlainValidator(read_setting), WithJsonSchema(_SETTING_SCHEMA)]],
    BeforeValidator(_or_empty),
]
DTypeName: TypeAlias = Annotated[str, AfterValidator(_read_dtype)]
Vocabulary: TypeAlias = Annotated[
    ModelName | Literal["union", "base"], PlainValidator(_read_vocabulary), WithJsonSchema(_NAME_SCHEMA)
]
Relaxation = Literal["extra_tensor", "missing_tensor", "nonfinite", "vocabulary"]
Missing = Literal["error", "skip", "copy"]
"""What becomes of a tensor that not all models have."""


class Record(BaseModel):
    """What every part of a recipe has in common: no unknown keys, no guessed types, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Record):
    """A model in `models:` or `sources:`, with its own settings; `layer_range` (sources only) is [first, end)."""

    model: Name
    layer_range: Annotated[tuple[int, int] | None, PlainValidator(_read_layer_range), WithJsonSchema(_RANGE_SCHEMA)] = (
        None
    )
    parameters: Parameters = Field(default_factory=dict)


class Slice(Record):
    """Layers of the output: the same number of layers from each source, merged."""

    sources: Many[Source]
    base_model: Name | None = None
    parameters: Parameters = Field(default_factory=dict)


class Module(Record):
    """A named part of a model with several (`text_decoder`, ...), made from `models` or from `slices`."""

    models: Many[Source] | None = None
    slices: Many[Slice] | None = None
    parameters: Parameters = Field(default_factory=dict)


class TokenSource(Record):
    """Where an embedding row comes from: zeros, or the row of one token of one model."""

    kind: Literal["model_token", "zero"]
    model: Name | None = None
    token_id: Annotated[int, Field(ge=0)] | None = None
    token: str | None = None


def _read_token_source(value: Any) -> ModelName | TokenSource | None:
    if isinstance(value, dict) and "kind" in value:
        return TokenSource.model_validate(value)
    return None if value is None else read_model_name(value)


class TokenRule(Record):
    """The embedding row of a token for models that lack it; with `force` for all models."""

    source: Annotated[
        ModelName | TokenSource | None,
        PlainValidator(_read_token_source),
        WithJsonSchema({"anyOf": [*_NAME_SCHEMA["anyOf"], _ROW_SCHEMA, {"type": "null"}]}),
    ] = None
    force: Annotated[bool, BeforeValidator(read_boolean)] = False


class Tokenizer(Record):
    """The output's vocabulary: that of a model, of the base (`base`), or the union of all (`union`)."""

    source: Vocabulary = "union"
    tokens: Annotated[dict[str, TokenRule], BeforeValidator(_or_empty)] = Field(default_factory=dict)
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """Settings of one level, for `select.Level`; `path` is where its `parameters:` stand in the recipe."""

    label: str
    path: KeyPath
    parameters: Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Block:
    """Sources that are merged with each other: all of `models:`, or one slice."""

    path: KeyPath
    """Of the list of sources."""
    module: str | None
    is_slice: bool
    sources: tuple[Source, ...]
    base_model: ModelName | None
    scopes: tuple[Scope, ...]
    """Outside the sources, nearest first: slice, module, recipe."""

    def is_base(self, index: int) -> bool:
        """Whether a source is the base model."""
        return self.base_model is not None and self.sources[index].model.key == self.base_model.key

    def source_scope(self, index: int) -> Scope:
        """The level of one source: the first to be asked for per-model settings."""
        source = self.sources[index]
        return Scope(f"model {source.model}", (*self.path, index, "parameters"), source.parameters)


def _read_number(value: Any) -> float:
    setting = read_setting(value)
    if not isinstance(setting, Scalar) or isinstance(setting.value, (bool, str)):
        refuse([Fault(f"a factor of `lines` must be one number, not {describe(value)}")])
    return float(setting.value)


Number: TypeAlias = Annotated[
    float, PlainValidator(_read_number), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
]


class Lines(Record):
    """LiNeS: the merged task vector of layer ℓ of L is scaled by alpha + beta (ℓ − 1) / (L − 1)."""

    alpha: Number
    beta: Number


class Body(Record):
    """What one merge is made of, and how."""

    merge_method: str
    base_model: Name | None = None
    models: Many[Source] | None = None
    slices: Many[Slice] | None = None
    modules: Annotated[dict[str, Module], Field(min_length=1)] | None = None
    parameters: Parameters = Field(default_factory=dict)
    lines: Lines | None = None
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    tokenizer_source: Vocabulary | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    allow: Annotated[tuple[Relaxation, ...], Field(strict=False)] = ()
    missing: Missing = "error"


class Step(Body):
    """A merge under a name, which the others may use as a model; with `keep` it is written down and used again."""

    keep: Annotated[bool, BeforeValidator(read_boolean)] = False


class Recipe(Body):
    """A whole recipe: the merge that is written, and the merges by name that it is made of."""

    name: str | None = None
    methods: Annotated[tuple[str, ...], Field(strict=False)] = ()
    merges: Annotated[dict[str, Step], Field(min_length=1)] | None = None

    _document: Document = PrivateAttr(default_factory=lambda: Document(None, "recipe"))
    _at: KeyPath = PrivateAttr(default=())
    """Where the recipe stands in its document: () for a whole one, ("merges", NAME) for one of its merges."""

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they were read."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    @property
    def source(self) -> str:
        """The name that messages use: of the file, or `recipe`."""
        return self._document.source

    def position(self, *path: str | int) -> str:
        """`recipe.yml:7:5` for a key (or its nearest known surroundings); the source name where nothing is known."""
        return self._document.label((*self._at, *path))

    def where(self, *path: str | int, value: bool = False) -> list[str]:
        """For the `where` of an error: the position of a key (or of its value), and the text of that line."""
        return self._document.where((*self._at, *path), value=value)

    @property
    def vocabulary(self) -> Tokenizer | None:
        """`tokenizer`, or what `tokenizer_source` says in its stead."""
        if self.tokenizer_source is not None:
            return Tokenizer(source=self.tokenizer_source)
        return self.tokenizer

    def steps(self) -> dict[str, Recipe]:
        """Each of `merges:` as a recipe of its own, by name. Where it names no type, its numbers are float32."""
        found = {}
        for name, step in (self.merges or {}).items():
            said = {key: getattr(step, key) for key in Body.model_fields}
            if step.dtype is None and step.out_dtype is None:
                said["out_dtype"] = "float32"
            recipe = Recipe.model_construct(**said)
            recipe._document, recipe._at = self._document, ("merges", name)
            found[name] = recipe
        return found

    def blocks(self) -> Iterator[Block]:
        """All that is merged, in recipe order."""
        outer = Scope("recipe", ("parameters",), self.parameters)
        if self.modules is None:
            yield from _blocks(self, self.models, self.slices, (), None, (outer,))
            return
        for name, module in self.modules.items():
            scope = Scope(f"module {name}", ("modules", name, "parameters"), module.parameters)
            yield from _blocks(self, module.models, module.slices, ("modules", name), name, (scope, outer))

    def model_names(self) -> list[ModelName]:
        """Every model that is merged or named as a base, each once, in recipe order; an unlisted base comes last."""
        listed = [source.model for block in self.blocks() for source in block.sources]
        bases = [block.base_model for block in self.blocks()]
        names: dict[str, ModelName] = {}
        for name in (*listed, *bases, self.base_model):
            if name is not None:
                names.setdefault(name.text, name)
        return list(names.values())

    def mentions(self) -> dict[ModelName, list[str]]:
        """Every model that must be opened, with the place where the recipe first names it (as `where` gives it).

        A model that only gives the tokenizer comes last.
        """
        paths: dict[str, KeyPath] = {}
        for block in self.blocks():
            for index, source in enumerate(block.sources):
                paths.setdefault(source.model.text, (*block.path, index, "model"))
            if block.base_model is not None and block.base_model is not self.base_model:
                paths.setdefault(block.base_model.text, (*block.path[:-1], "base_model"))
        if self.base_model is not None:
            paths.setdefault(self.base_model.text, ("base_model",))
        names = {name.text: name for name in self.model_names()}
        asked = self.vocabulary.source if self.vocabulary is not None else None
        if isinstance(asked, ModelName) and asked.text not in names:
            names[asked.text] = asked
            simple = self.tokenizer_source is not None
            paths[asked.text] = ("tokenizer_source",) if simple else ("tokenizer", "source")
        return {name: self.where(*paths[text], value=True) for text, name in names.items()}


def _blocks(
    recipe: Recipe,
    models: tuple[Source, ...] | None,
    slices: tuple[Slice, ...] | None,
    path: KeyPath,
    module: str | None,
    scopes: tuple[Scope, ...],
) -> Iterator[Block]:
    if models is not None:
        yield Block((*path, "models"), module, False, models, recipe.base_model, scopes)
    for index, part in enumerate(slices or ()):
        at = (*path, "slices", index)
        scope = Scope(f"slice {index + 1}", (*at, "parameters"), part.parameters)
        base = part.base_model or recipe.base_model
        yield Block((*at, "sources"), module, True, part.sources, base, (scope, *scopes))
