"""The recipe's `models` or `slices` as sections: who contributes which layers, and who is the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smelt.errors import RecipeError, SmeltError
from smelt.methods.api import MethodInfo
from smelt.planning.align import Contributor, Section
from smelt.planning.locate import Model
from smelt.planning.parts import find_part, part_of
from smelt.recipe.schema import Block, Recipe, Scope


def sections(
    recipe: Recipe, info: MethodInfo, models: Sequence[Model], place: Mapping[str, int]
) -> tuple[list[Section], list[SmeltError]]:
    """Who contributes to which output layers, and what is wrong with it. `place` maps names to places in `models`.

    A base that the method uses is a contributor marked as base: where `models` does not list it, it is added last. For
    a method without a base, base_model is a contributor like others if it is listed, and none if it is not.
    """
    problems: list[SmeltError] = []
    result = []
    for block in recipe.blocks():
        base = None if block.base_model is None or info.base == "none" else place[block.base_model.text]
        contributors = _contributors(block, recipe, models, place, base, problems)
        count = sum(not one.is_base for one in contributors)
        low, high = info.models
        if base is not None and not any(one.is_base for one in contributors) and block.is_slice:
            pass  # told below
        elif count < low or (high is not None and count > high):
            problems.append(_wrong_count(block, recipe, info, contributors))
        if base is not None and not any(one.is_base for one in contributors):
            if block.is_slice:
                problems.append(_unlisted_base(block, recipe, info))
            else:
                scope = Scope(f"model {block.base_model}", (), {})
                contributors.append(
                    Contributor(base, str(block.base_model), _whole(models[base], block.module), scope, True)
                )
        result.append(Section(block.scopes[0].label, tuple(contributors), block.scopes, block.is_slice, block.module))
    return result, problems


def _contributors(
    block: Block,
    recipe: Recipe,
    models: Sequence[Model],
    place: Mapping[str, int],
    base: int | None,
    problems: list[SmeltError],
) -> list[Contributor]:
    contributors = []
    for i, source in enumerate(block.sources):
        index = place[source.model.text]
        model = models[index]
        whole = _whole(model, block.module)
        layers = source.layer_range or whole
        if source.layer_range is not None and whole[1] and layers[1] > whole[1]:
            problems.append(
                RecipeError(
                    f"layer_range {list(layers)} goes beyond {model.name}, which has {whole[1]} layers",
                    where=recipe.where(*block.path, i, "layer_range"),
                    fix=f"end the range at {whole[1]} or before (the end is not included)",
                )
            )
        contributors.append(Contributor(index, source.model.text, layers, block.source_scope(i), index == base))
    if block.is_slice and len({one.layers[1] - one.layers[0] for one in contributors}) > 1:
        problems.append(
            RecipeError(
                f"{block.scopes[0].label} takes layer ranges of different lengths",
                where=[
                    *recipe.where(*block.path),
                    *(f"{one.text}  {list(one.layers)}: {one.layers[1] - one.layers[0]}" for one in contributors),
                ],
                fix="give every source of a slice the same number of layers",
            )
        )
    return contributors


def _wrong_count(block: Block, recipe: Recipe, info: MethodInfo, contributors: Sequence[Contributor]) -> RecipeError:
    """The recipe's own check counts names; two names of one folder are found only here."""
    given = [f"{one.text}{'  (the base)' if one.is_base else ''}" for one in contributors]
    return RecipeError(
        f"{info.name} takes {info.arity()}{' besides the base' if info.base != 'none' else ''}",
        where=[*recipe.where(*block.path), *given],
        fix="list each model once, under one name",
    )


def _unlisted_base(block: Block, recipe: Recipe, info: MethodInfo) -> RecipeError:
    return RecipeError(
        f"a slice does not list the base model {block.base_model}, which {info.name} uses",
        where=recipe.where(*block.path),
        fix=f"add `- model: {block.base_model}` with its `layer_range` to these sources",
    )


def _whole(model: Model, module: str | None) -> tuple[int, int]:
    """All layers of the stack that ranges mean: the main one, or that of the module's part; (0, 0) if unknown."""
    stack = model.anatomy.main
    if module is not None:
        of = part_of(model.anatomy)
        home = next((of[name] for name, part in model.anatomy.parts.items() if part.stack == stack), None)
        part = find_part(module, of.values(), main=home)
        stacks = {found.stack for name, found in model.anatomy.parts.items() if of[name] == part and found.stack}
        stack = stacks.pop() if len(stacks) == 1 else None
    return 0, model.anatomy.stacks.get(stack or "", 0)
