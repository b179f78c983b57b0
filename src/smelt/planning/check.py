"""The laws of a plan, executed: what must hold of every plan before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence

from smelt.errors import SmeltError, raise_all
from smelt.methods import api
from smelt.planning.entries import Action, Entry, Plan
from smelt.planning.locate import Model
from smelt.storage.writer import Layout


def check(plan: Plan, models: Sequence[Model], layout: Layout) -> None:
    """Raise what breaks a law; a broken law is a defect of the planner, not of the input.

    Each output tensor is written once and as planned; every input exists as stated, and shapes agree; every method
    gets the inputs and the parameters that it declares; every stored tensor is used, copied or ignored for a reason.
    """
    problems: list[SmeltError] = []
    seen: set[str] = set()
    for entry in plan.entries:
        if entry.name in seen:
            problems.append(_broken(entry, "is written twice"))
        seen.add(entry.name)
        spec = layout.spec(entry.name)
        if (spec.shape, spec.dtype) != (entry.shape, entry.dtype):
            problems.append(_broken(entry, f"has another place in the layout: {spec}"))
        problems.extend(_check_inputs(entry, models))
    planned = {tensor for shard in layout.shards for tensor in shard.tensors}
    if planned != seen:
        problems.append(SmeltError(f"the layout and the plan differ in {sorted(planned ^ seen)[:5]}"))
    used = {(source.model, source.tensor.name) for entry in plan.entries for source in entry.sources}
    for index, model in enumerate(models):
        lost = [
            name
            for name in model.source.tensors
            if (index, name) not in used and f"{model.name}: {name}" not in plan.ignored and name not in seen
        ]
        if lost:
            problems.append(SmeltError(f"{len(lost)} tensors of {model.name} are lost: {lost[:5]}"))
    raise_all(problems)


def _check_inputs(entry: Entry, models: Sequence[Model]) -> list[SmeltError]:
    problems = []
    for source in entry.sources:
        stored = models[source.model].source.tensors.get(source.tensor.name)
        if stored != source.tensor:
            problems.append(_broken(entry, f"takes {source.tensor}, which {models[source.model].name} does not have"))
        if source.tensor.shape != entry.shape:
            problems.append(_broken(entry, f"takes {source.tensor}, which has another shape"))
    if entry.action is not Action.MERGE:
        if any(source.tensor.dtype is not entry.dtype for source in entry.sources):
            problems.append(_broken(entry, "copies bytes of another type"))
        return problems
    info = api.get(entry.method)
    if set(entry.values) != set(info.fields):
        problems.append(_broken(entry, f"has values for {sorted(entry.values)}, not {sorted(info.fields)}"))
    for name, field in info.fields.items():
        if field.per_model and len(entry.values.get(name, ())) != len(entry.inputs):
            problems.append(_broken(entry, f"has not one {name} per model"))
    if info.base == "required" and entry.base is None:
        problems.append(_broken(entry, "has no base"))
    return problems


def _broken(entry: Entry, what: str) -> SmeltError:
    return SmeltError(f"the plan is unsound: tensor '{entry.name}' {what}", fix="please report this as a bug of smelt")
