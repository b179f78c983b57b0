"""The merges that a recipe is made of: each planned, and opened as a model that computes what is read of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from smelt.engine.steps import StepSource
from smelt.errors import SmeltError, raise_all
from smelt.planning.anatomy import anatomy, check
from smelt.planning.build import build
from smelt.planning.companions import small_files
from smelt.planning.entries import Plan, PlannedModel
from smelt.planning.locate import Model
from smelt.recipe.nesting import needed, unused
from smelt.recipe.schema import Recipe
from smelt.specs import ModelRef

PLACE = "a merge of this recipe"
"""Where plans say that such a model is."""
_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Step:
    """A merge by name: its recipe, its plan over `models`, and what is read of it."""

    name: str
    recipe: Recipe
    plan: Plan
    models: tuple[Model, ...]
    tokenizer: Model
    source: StepSource
    keep: bool


def open_steps(
    recipe: Recipe, opened: Mapping[str, Model], *, allow: frozenset[str], seed: int
) -> tuple[dict[str, Model], tuple[Step, ...]]:
    """All models of a recipe by name, its merges among them; and these, each after those that it is made of.

    `opened` has the stored models of the recipe and of its merges, `allow` what is relaxed for all of them. Raises all
    problems of the first merge that has any.
    """
    models = dict(opened)
    recipes = recipe.steps()
    found = []
    for name in needed(recipe):
        try:
            step, model = _open(name, recipes[name], models, allow, seed, keep=(recipe.merges or {})[name].keep)
        except SmeltError as error:
            raise_all(_within(name, problem) for problem in error.problems)
            raise
        found.append(step)
        models[name] = model
    return models, tuple(found)


def _open(
    name: str, recipe: Recipe, opened: Mapping[str, Model], allow: frozenset[str], seed: int, *, keep: bool
) -> tuple[Step, Model]:
    plan = build(recipe, opened, allow=allow, seed=seed)
    models = tuple({id(opened[one.text]): opened[one.text] for one in recipe.model_names()}.values())
    tokenizer = next(model for model in opened.values() if model.name == plan.tokenizer)
    documents = small_files(plan, models, tokenizer)
    if (card := models[plan.donor].source.bytes(_CARD)) is not None:  # for the licence that it names
        documents[_CARD] = card
    source = StepSource(
        name,
        plan,
        [model.source for model in models],
        documents=documents,
        allow_nonfinite="nonfinite" in allow or "nonfinite" in recipe.allow,
    )
    config = source.json("config.json")
    parts = anatomy(source.tensors, config)
    raise_all(check(parts, config, name))
    planned = PlannedModel(ModelRef(name, name), name, PLACE, merged=True)
    return Step(name, recipe, plan, models, tokenizer, source, keep), Model(planned, source, config, parts)


def _within(name: str, problem: SmeltError) -> SmeltError:
    return type(problem)(problem.message, where=[*problem.where, f"in the merge `{name}`"], fix=problem.fix)


def with_steps(plan: Plan, recipe: Recipe, steps: Sequence[Step]) -> Plan:
    """The plan with what is to be said of the merges that it is made of among its notes and warnings."""
    notes = [f"in the merge `{step.name}`: {note}" for step in steps for note in step.plan.notes]
    warnings = [f"in the merge `{step.name}`: {warning}" for step in steps for warning in step.plan.warnings]
    return replace(plan, notes=(*plan.notes, *notes), warnings=(*unused(recipe), *plan.warnings, *warnings))


def further_models(models: Sequence[Model], steps: Sequence[Step]) -> list[Model]:
    """The stored models that only merges within a recipe use, and not the output itself; each once."""
    known = {id(model) for model in models}
    found = {id(model): model for step in steps for model in step.models if not model.planned.merged}
    return [model for key, model in found.items() if key not in known]
