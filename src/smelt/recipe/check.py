"""A recipe against its method's declaration: parameters, their values and places, the number of models, the base."""

from __future__ import annotations

from collections.abc import Iterator

from smelt.errors import RecipeError, SmeltError, nearest
from smelt.methods import api
from smelt.methods.api import MethodInfo
from smelt.recipe.document import KeyPath, visible
from smelt.recipe.faults import describe
from smelt.recipe.references import windows_path_fix
from smelt.recipe.schema import Block, ModelName, Recipe, Scope
from smelt.recipe.settings import Setting, scalars


def check_parameters(recipe: Recipe, *, present_only: bool = False) -> list[SmeltError]:
    """Every problem of a recipe that its method's declaration tells; no model is opened.

    `present_only` judges what is there and not what is missing: for a recipe with other faults.
    """
    problems = _own_problems(recipe, present_only=present_only)
    for step in recipe.steps().values():
        problems += _own_problems(step, present_only=present_only)
    return problems


def _own_problems(recipe: Recipe, *, present_only: bool) -> list[SmeltError]:
    """The problems of one merge, those that it is made of apart."""
    problems = [*_foreign_paths(recipe), *_twice_answered(recipe)]
    if recipe.merge_method not in api.names():
        unknown = f"unknown merge_method '{visible(recipe.merge_method)}'"
        where = recipe.where("merge_method", value=True)
        return [*problems, RecipeError(unknown, where=where, fix=_near_methods(recipe.merge_method))]
    return [*problems, *_Check(recipe, present_only=present_only).problems]


def _near_methods(name: str) -> str:
    """What to write instead of a method that there is not: all of its family, the nearest one, or the list."""
    known = api.names()
    family = [one for one in known if one.startswith(f"{name.lower()}_")]
    close = nearest(name, known)
    if len(family) > 1:
        return f"did you mean {' or '.join(f'`{one}`' for one in family)}?"
    return f"did you mean `{close}`?" if close else f"known methods: {', '.join(known)}"


def _foreign_paths(recipe: Recipe) -> list[SmeltError]:
    """Models whose names are paths of Windows, on a system that has other paths."""
    names: list[tuple[KeyPath, ModelName | None]] = [(("base_model",), recipe.base_model)]
    for block in recipe.blocks():
        if block.is_slice:
            names.append(((*block.path[:-1], "base_model"), block.base_model))
        names += [((*block.path, index, "model"), source.model) for index, source in enumerate(block.sources)]
    problems: list[SmeltError] = []
    for path, name in names:
        fix = None if name is None else windows_path_fix(name.text)
        if name is not None and fix is not None:
            message = f"'{visible(name.text)}' is a Windows path, and this is not Windows"
            problems.append(RecipeError(message, where=recipe.where(*path, value=True), fix=fix))
    return problems


def _twice_answered(recipe: Recipe) -> list[SmeltError]:
    """`missing` and `allow` that both say what becomes of tensors that not all models have."""
    both = sorted({"missing_tensor", "extra_tensor"} & set(recipe.allow))
    if recipe.missing == "error" or not both:
        return []
    words = " and ".join(f"`{word}`" for word in both)
    return [
        RecipeError(
            f"`missing: {recipe.missing}` and {words} under `allow` contradict each other",
            where=[*recipe.where("missing"), *recipe.where("allow")],
            fix=f"keep one: `missing` says what becomes of every tensor that not all models have; drop {words}",
        )
    ]


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
        if recipe.lines is not None and "lambda" not in self.info.fields:
            self._report(
                f"{self.info.name} has no `lambda`, which `lines` scales by layer",
                ("lines",),
                "remove `lines:`, or use a method with `lambda`, such as task_arithmetic or ties",
            )
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
                self._report(f"`{name}` {error}{given}", place_, _as_number(value), value=True)

    def _unknown(self, name: str, path: KeyPath) -> None:
        close = nearest(name, self.info.fields)
        takes = f"{self.info.name} takes {', '.join(self.info.fields) or 'no parameters'}"
        owners = [one for one in api.names() if name in api.get(one).fields]
        if close:
            self.meant.add(close)
        elif 0 < len(owners) <= 4:
            takes = f"it belongs to {', '.join(owners)}; {takes}"
        self._report(
            f"{self.info.name} has no parameter `{visible(name)}`",
            path,
            f"did you mean `{close}`?" if close else takes,
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
                self._needed(name, block)
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

    def _needed(self, name: str, block: Block) -> None:
        """Report a method-wide parameter that a block lacks; once for the recipe where no block has it."""
        blocks = [one for one in self.recipe.blocks() if one.is_slice or one.module is not None]
        somewhere = any(name in scope.parameters for one in blocks for scope in one.scopes)
        where: KeyPath = block.path[:-1] if somewhere else ("merge_method",)
        to = f"to {block.scopes[0].label}, or to the recipe" if somewhere else "to the recipe"
        self._report(f"{self.info.name} needs `{name}`", where, f"add `parameters: {{{name}: ...}}` {to}")


def _as_number(value: object) -> str | None:
    """`write 0.5` for what people write when they mean it: 50 %, 0,5."""
    text = value.strip() if isinstance(value, str) else ""
    try:
        if text.endswith("%"):
            return f"write {float(text[:-1]) / 100:g}"
        return f"write {float(text.replace(',', '.', 1)):g}" if "," in text else None
    except ValueError:
        return None


def _arity_fix(info: MethodInfo, block: Block, count: int) -> str | None:
    low, _ = info.models
    if count < low:
        return "add a model" if count else "add models that are not the base"
    if block.is_slice and info.models == (1, 1) and info.base == "none":
        return "to stack layers, give each model a slice of its own; to blend them, use another method"
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
