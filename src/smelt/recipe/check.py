"""A recipe against its method's declaration: parameters, their values and places, the number of models, the base."""

from __future__ import annotations

from collections.abc import Iterator

from smelt.errors import RecipeError, SmeltError, nearest
from smelt.methods import api
from smelt.methods.api import MethodInfo
from smelt.recipe.document import KeyPath, visible
from smelt.recipe.faults import describe
from smelt.recipe.schema import Block, Recipe, Scope
from smelt.recipe.settings import Setting, scalars


def check_parameters(recipe: Recipe, *, present_only: bool = False) -> list[SmeltError]:
    """Every problem of a recipe that its method's declaration tells; no model is opened.

    `present_only` judges what is there and not what is missing: for a recipe with other faults.
    """
    if recipe.merge_method not in api.names():
        close = nearest(recipe.merge_method, api.names())
        known = f"known methods: {', '.join(api.names())}"
        return [
            RecipeError(
                f"unknown merge_method '{visible(recipe.merge_method)}'",
                where=recipe.where("merge_method", value=True),
                fix=f"did you mean `{close}`?" if close else known,
            )
        ]
    return _Check(recipe, present_only=present_only).problems


def _may_hide_base(block: Block, info: MethodInfo) -> bool:
    """Whether one of the sources may be the base under another name (an absolute path, a link).

    That is known only when the models are open; the planner counts again.
    """
    listed = any(block.is_base(index) for index in range(len(block.sources)))
    return info.base != "none" and block.base_model is not None and not listed


def notes(recipe: Recipe) -> list[str]:
    """What a recipe says to no effect, each with its position: parameters that the method accepts and never uses."""
    if recipe.merge_method not in api.names():
        return []
    info = api.get(recipe.merge_method)
    found: dict[str, None] = {}
    for scope, _ in _scopes(recipe):
        for name in scope.parameters:
            if name in info.ignored and name not in info.fields:
                place = recipe.position(*scope.path, name)
                found[f"{place}: `{name}` has no effect in {info.name}: {info.ignored[name]}"] = None
    for block in recipe.blocks() if info.base != "none" else ():
        for index, source in enumerate(block.sources):
            used = [name for name in source.parameters if name in info.fields]
            if block.is_base(index) and used:
                place = recipe.position(*block.path, index, "parameters")
                shown = ", ".join(f"`{name}`" for name in used)
                found[f"{place}: {shown} of {source.model} has no effect: it is the base model"] = None
    return list(found)


class _Check:
    def __init__(self, recipe: Recipe, *, present_only: bool) -> None:
        self.recipe = recipe
        self.info: MethodInfo = api.get(recipe.merge_method)
        self.problems: list[SmeltError] = []
        self.meant: set[str] = set()
        """Fields that a misspelt or misplaced parameter meant: they are not reported as missing too."""
        for scope, of_model in _scopes(recipe):
            for name, setting in scope.parameters.items():
                self._parameter(name, setting, (*scope.path, name), of_model=of_model)
        for block in () if present_only else recipe.blocks():
            self._models(block)
            self._required(block)

    def _report(self, message: str, path: KeyPath, fix: str | None = None, *, value: bool = False) -> None:
        self.problems.append(RecipeError(message, where=self.recipe.where(*path, value=value), fix=fix))

    def _parameter(self, name: str, setting: Setting, path: KeyPath, *, of_model: bool) -> None:
        field = self.info.fields.get(name)
        if field is None:
            if name not in self.info.ignored:
                self._unknown(name, path)
            return
        if of_model and not field.per_model:
            self.meant.add(name)
            place = "the slice's or the recipe's" if "slices" in path else "the recipe's"
            self._report(
                f"`{name}` is method-wide and is not read at model level", path, f"move it to {place} `parameters:`"
            )
        for place_, value in scalars(setting, path):
            try:
                field.check(value)
            except (ValueError, OverflowError) as error:
                given = "" if "not " in str(error) else f", not {describe(value)}"
                self._report(f"`{name}` {error}{given}", place_, value=True)

    def _unknown(self, name: str, path: KeyPath) -> None:
        close = nearest(name, self.info.fields)
        takes = ", ".join(self.info.fields) or "no parameters"
        if close:
            self.meant.add(close)
        self._report(
            f"{self.info.name} has no parameter `{visible(name)}`",
            path,
            f"did you mean `{close}`?" if close else f"{self.info.name} takes {takes}",
        )

    def _models(self, block: Block) -> None:
        info = self.info
        uses_base = info.base != "none"
        bases = [index for index in range(len(block.sources)) if uses_base and block.is_base(index)]
        if info.base == "required" and block.base_model is None:
            where: KeyPath = block.path[:-1] if block.is_slice else ("merge_method",)
            self._report(f"{info.name} needs a base model", where, "add `base_model: ...` to the recipe")
            return
        if len(bases) > 1:
            self._report(
                f"the base model {block.base_model} is listed twice", (*block.path, bases[1]), "list the base once"
            )
        count = len(block.sources) - len(bases)
        low, high = info.models
        if high is not None and _may_hide_base(block, info):
            high += 1
        if count < low or (high is not None and count > high):
            besides = " besides the base" if bases or (uses_base and block.base_model is not None) else ""
            self._report(
                f"{info.name} takes {info.arity()}{besides}, not {count}", block.path, _arity_fix(info, block, count)
            )

    def _required(self, block: Block) -> None:
        outer = {name for scope in block.scopes for name in scope.parameters}
        for name, field in self.info.fields.items():
            if not field.is_required or name in outer or name in self.meant:
                continue
            if not field.per_model:
                where: KeyPath = block.path[:-1] if len(block.path) > 1 else ("merge_method",)
                self._report(f"{self.info.name} needs `{name}`", where, f"add `parameters: {{{name}: ...}}`")
                continue
            unset = [
                index
                for index, source in enumerate(block.sources)
                if name not in source.parameters and not (self.info.base != "none" and block.is_base(index))
            ]
            if len(unset) == 1 and len(block.sources) > 1 and _may_hide_base(block, self.info):
                continue
            for index in unset:
                source = block.sources[index]
                self._report(
                    f"{self.info.name} needs `{name}` for {source.model}",
                    (*block.path, index),
                    f"add `parameters: {{{name}: ...}}` beside its `model:`, or to the recipe for all models",
                )


def _arity_fix(info: MethodInfo, block: Block, count: int) -> str | None:
    low, _ = info.models
    if count < low:
        return "add a model" if count else "add models that are not the base"
    if info.base == "none" and block.base_model is not None:
        return "remove a model, or use a method that takes more"
    return "remove models, or use a method that takes more (`smelt methods` lists them)"


def _scopes(recipe: Recipe) -> Iterator[tuple[Scope, bool]]:
    """Every place where parameters stand, once, and whether it is a model's."""
    seen: set[KeyPath] = set()
    for block in recipe.blocks():
        for index in range(len(block.sources)):
            yield block.source_scope(index), True
        for scope in block.scopes:
            if scope.path not in seen:
                seen.add(scope.path)
                yield scope, False
