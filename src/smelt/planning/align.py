"""Which stored tensors of which models belong together: one slot per output tensor.

The donor (the base, else the first model) says which tensors there are and what they are called. With `slices`, output
layer k of the stack takes layer `layer_range[0] + offset` of each source; tensors before the stack come from the first
slice's sources, those after it from the last slice's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from smelt.errors import InputError, RecipeError, SmeltError
from smelt.planning.anatomy import Part, Role
from smelt.planning.locate import Model
from smelt.planning.parts import find_part, near_part, part_of
from smelt.recipe.schema import Recipe, Scope
from smelt.specs import TensorSpec


@dataclass(frozen=True, slots=True)
class Contributor:
    """A model's part in a slice: its place in the plan's models, the recipe's words about it, its layers."""

    model: int
    text: str
    layers: tuple[int, int]
    scope: Scope
    is_base: bool


@dataclass(frozen=True, slots=True)
class Section:
    """Output layers that are made of the same sources: a slice of the recipe, or all of a `models` recipe."""

    label: str
    contributors: tuple[Contributor, ...]
    scopes: tuple[Scope, ...]
    """Its levels of settings outside the models, nearest first."""
    is_slice: bool = False
    module: str | None = None
    copied: bool = False
    """Taken from its one contributor as it is, whatever the method."""

    @property
    def length(self) -> int:
        low, high = self.contributors[0].layers
        return high - low


@dataclass(frozen=True, slots=True)
class Slot:
    """One output tensor before its numbers are known: the tensors that go in, and its place t in a gradient."""

    name: str
    part: Part
    section: Section
    t: float
    tensors: tuple[TensorSpec | None, ...]
    """One per contributor of the section; None where a model lacks it."""


@dataclass(slots=True)
class Alignment:
    """All slots in output order, and the input tensors that go nowhere, with the reason.

    `restacked` gives, for each stack that slices make anew, the source layer of every output layer.
    """

    slots: list[Slot] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    problems: list[SmeltError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    restacked: dict[str, tuple[int, ...]] = field(default_factory=dict)


def align(recipe: Recipe, models: Sequence[Model], sections: Sequence[Section], *, donor: int) -> Alignment:
    """Match the tensors of the models; what does not match is told in `problems`, all of it."""
    result = Alignment()
    giver = models[donor]
    names = list(_names(giver, models, result))
    if recipe.modules is None:
        _align_group(giver, models, names, sections, giver.anatomy.main, result)
    else:
        _align_modules(recipe, giver, models, names, sections, result, donor)
    _extra(recipe, models, donor, result)
    return result


Names = Sequence[tuple[str, Part]]


def _align_group(
    giver: Model,
    models: Sequence[Model],
    names: Names,
    sections: Sequence[Section],
    stack: str | None,
    result: Alignment,
) -> None:
    """The slots of `names`, made of `sections`; slices make the layers of `stack` anew."""
    if sections[0].is_slice:
        _align_slices(giver, models, names, sections, stack, result)
        return
    for name, part in names:
        length = giver.anatomy.stacks.get(part.stack or "", 1)
        result.slots.append(_slot(name, part, sections[0], models, _position(part.layer, length)))


def _align_modules(
    recipe: Recipe,
    giver: Model,
    models: Sequence[Model],
    names: Names,
    sections: Sequence[Section],
    result: Alignment,
    donor: int,
) -> None:
    """One group for each module of the recipe; parts that it does not name come from the donor as they are."""
    of = part_of(giver.anatomy)
    home = of.get(next((name for name, part in names if part.stack == giver.anatomy.main), ""))
    parts = {name: of.get(name, home or "model") for name, _ in names}
    named: dict[str, str] = {}
    for module in recipe.modules or {}:
        chosen = find_part(module, parts.values(), main=home)
        where = recipe.where("modules", module)
        if chosen is None:
            fix = near_part(module, parts.values())
            result.problems.append(RecipeError(f"module `{module}` is no part of {giver.name}", where=where, fix=fix))
            continue
        if chosen in named:
            what = f"modules `{named[chosen]}` and `{module}` are the same part, {chosen}"
            result.problems.append(RecipeError(what, where=where, fix="keep one of them"))
            continue
        named[chosen] = module
        own = [(name, found) for name, found in names if parts[name] == chosen]
        stacks = [found.stack for _, found in own if found.stack is not None]
        stack = giver.anatomy.main if giver.anatomy.main in stacks else (stacks[0] if len(set(stacks)) == 1 else None)
        group = [section for section in sections if section.module == module]
        _align_group(giver, models, own, group, stack, result)
    rest = sorted(set(parts.values()) - set(named))
    scope = Scope("recipe", ("parameters",), {})
    copied = Section("rest", (Contributor(donor, giver.name, (0, 0), scope, False),), (scope,), copied=True)
    for name, part in names:
        if parts[name] in rest:
            result.slots.append(_slot(name, part, copied, models, 0.0))
    if rest:
        result.notes.append(f"parts that `modules` does not name are copied from {giver.name}: {', '.join(rest)}")


def _position(layer: int | None, length: int) -> float:
    """Place in a gradient: 0 outside the stack, k / (L − 1) inside, 1 for a stack of one layer."""
    if layer is None:
        return 0.0
    return layer / (length - 1) if length > 1 else 1.0


def _names(giver: Model, models: Sequence[Model], result: Alignment) -> Iterator[tuple[str, Part]]:
    """The donor's tensors in its order, and a head that only others have on disk."""
    yield from giver.anatomy.parts.items()
    if giver.anatomy.head is None:
        for other in models:
            head = other.anatomy.head
            if head is not None and head not in giver.source.tensors and giver.anatomy.tied:
                result.notes.append(
                    f"{other.name} has an output head of its own ({head}), {giver.name} uses its embedding as head: "
                    "the merged model gets a head of its own"
                )
                yield head, other.anatomy.parts[head]
                return


def _slot(name: str, part: Part, section: Section, models: Sequence[Model], t: float, offset: int = -1) -> Slot:
    """The slot of one output tensor; `offset` is its layer within the section, −1 to take the same name everywhere."""
    tensors = []
    for contributor in section.contributors:
        model = models[contributor.model]
        wanted = name
        if offset >= 0 and part.stack is not None:
            wanted = f"{part.stack}.{contributor.layers[0] + offset}.{part.suffix}"
        tensors.append(_stored(model, wanted, part))
    return Slot(name, part, section, t, tuple(tensors))


def _stored(model: Model, name: str, part: Part) -> TensorSpec | None:
    found = model.source.tensors.get(name)
    if found is None and part.role is Role.HEAD and model.anatomy.tied and model.anatomy.embedding is not None:
        shared = model.source.tensors[model.anatomy.embedding]
        return shared if len(shared.shape) == 2 and name.endswith("weight") else None
    return found


def _align_slices(
    giver: Model,
    models: Sequence[Model],
    names: Names,
    sections: Sequence[Section],
    stack: str | None,
    result: Alignment,
) -> None:
    if stack is None:
        result.problems.append(_no_main_stack(giver))
        return
    first, last = sections[0], sections[-1]
    after = (Role.AFTER, Role.HEAD)
    for name, part in names:
        if part.stack != stack and part.role not in after:
            length = giver.anatomy.stacks.get(part.stack or "", 1)
            result.slots.append(_slot(name, part, first, models, _position(part.layer, length)))
    layers = {index: _layers_of(model, stack) for index, model in enumerate(models)}
    layer = 0
    source_layers = []
    for section in sections:
        for offset in range(section.length):
            t = _position(offset, section.length)
            for suffix, part in _layer_parts(section, offset, layers).items():
                placed = Part(part.role, stack, layer, suffix, part.expert)
                name = f"{stack}.{layer}.{suffix}"
                result.slots.append(_slot(name, placed, section, models, t, offset))
            source_layers.append(section.contributors[0].layers[0] + offset)
            layer += 1
    for name, part in names:
        if part.stack != stack and part.role in after:
            result.slots.append(_slot(name, part, last, models, 0.0))
    result.restacked[stack] = tuple(source_layers)
    others = sorted({part.stack for _, part in names if part.stack not in (stack, None)})
    if others:
        result.notes.append(
            f"layer ranges mean the stack {stack}; {', '.join(map(str, others))} come whole from the first slice"
        )
    _unused_layers(models, stack, sections, result)


def _layer_parts(section: Section, offset: int, layers: Mapping[int, dict[int, list[Part]]]) -> dict[str, Part]:
    """The tensors of a layer, by suffix: those of the first source, then what others have beyond it."""
    found: dict[str, Part] = {}
    for contributor in section.contributors:
        for part in layers[contributor.model].get(contributor.layers[0] + offset, ()):
            found.setdefault(part.suffix, part)
    return found


def _layers_of(model: Model, stack: str) -> dict[int, list[Part]]:
    """The parts of each layer of a stack."""
    layers: dict[int, list[Part]] = {}
    for part in model.anatomy.parts.values():
        if part.stack == stack and part.layer is not None:
            layers.setdefault(part.layer, []).append(part)
    return layers


def _unused_layers(models: Sequence[Model], stack: str, sections: Sequence[Section], result: Alignment) -> None:
    used: dict[int, set[int]] = {}
    for section in sections:
        for contributor in section.contributors:
            used.setdefault(contributor.model, set()).update(range(*contributor.layers))
    for index, model in enumerate(models):
        layers = used.get(index, set())
        for name, part in model.anatomy.parts.items():
            if part.stack == stack and part.layer is not None and part.layer not in layers:
                result.ignored[f"{model.name}: {name}"] = "its layer is in no slice"


def _no_main_stack(giver: Model) -> RecipeError:
    stacks = [f"{name} ({length} layers)" for name, length in giver.anatomy.stacks.items()] or ["none found"]
    return RecipeError(
        f"layer ranges need one stack of layers, and which one of {giver.name} is meant is not clear",
        where=[f"stacks of layers: {', '.join(stacks)}"],
        fix="use `models:` to merge all of it, or give each part its slices under `modules:`",
    )


def _extra(recipe: Recipe, models: Sequence[Model], donor: int, result: Alignment) -> None:
    """Tensors that other models have beyond the donor's: buffers are ignored, anything else is a problem.

    With `missing: skip` or `copy` they get slots like others, after the donor's; the planner decides on them.
    """
    taken = {slot.name for slot in result.slots}
    giver = models[donor]
    for index, model in enumerate(models):
        if index == donor:
            continue
        extra = []
        for name, part in model.anatomy.parts.items():
            if part.stack in result.restacked or name in taken or name in giver.source.tensors:
                continue
            if part.role is Role.BUFFER:
                result.ignored[f"{model.name}: {name}"] = "a buffer that the donor does not keep"
            else:
                extra.append(name)
        if extra and recipe.missing != "error":
            taken.update(extra)
            result.slots.extend(_slot(name, model.anatomy.parts[name], _all_of(models), models, 0.0) for name in extra)
        elif extra:
            result.problems.append(ExtraTensors(model.name, giver.name, extra))


def _all_of(models: Sequence[Model]) -> Section:
    """Every model, without settings: where the tensors belong that the donor lacks."""
    scope = Scope("recipe", ("parameters",), {})
    every = (Contributor(index, model.planned.ref.text, (0, 0), scope, False) for index, model in enumerate(models))
    return Section("beyond the donor", tuple(every), (scope,))


class ExtraTensors(InputError):
    """A model has tensors that the donor lacks; `allow: [extra_tensor]` leaves them out."""

    def __init__(self, model: str, donor: str, names: Sequence[str]) -> None:
        shown = [*names[:6], *([f"… and {len(names) - 6} more"] if len(names) > 6 else [])]
        super().__init__(
            f"model {model} has {len(names)} tensor{'s' if len(names) > 1 else ''} that {donor} lacks",
            where=shown,
            fix=f"drop {model}, or leave these tensors out with `allow: [extra_tensor]` (--allow extra_tensor), "
            "or keep them with `missing: copy`",
        )
        self.names = tuple(names)
        self.model = model
