"""What commands say of the merges within a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smelt.cli.show import counted, size_text
from smelt.engine.forecast import passes
from smelt.engine.nesting import Step
from smelt.keeping import Kept
from smelt.planning.entries import Entry, Plan
from smelt.prepared import Prepared


def models_of_steps(prepared: Prepared) -> list[list[str]]:
    """Rows for the models that only merges within the recipe use: where they are used, the name, the place."""
    shown = {model.planned.published for model in prepared.models}
    rows = []
    for step in prepared.steps:
        for model in step.models:
            planned = model.planned
            if planned.published not in shown and not planned.merged:
                shown.add(planned.published)
                place = f"hub, commit {planned.commit[:12]}" if planned.commit else planned.place
                rows.append([f"in {step.name}", planned.published, place])
    return rows


def of_steps(prepared: Prepared) -> list[str]:
    """A line for each merge within the recipe, and one that compares with doing them one after the other."""
    if not prepared.steps:
        return []
    forecast = prepared.forecast
    lines = []
    for step in prepared.steps:
        names = ", ".join(model.name for model in step.models)
        most = _most_passes(step)
        lines.append(
            f"merge {step.name}: {step.plan.method} of {names}, "
            f"{' and '.join(_types(step))}, {most} pass{'es' if most > 1 else ''}, {_where(step, prepared)}"
        )
    lines.append(
        f"{counted(1 + len(prepared.steps), 'merge')} in one run: reads {size_text(forecast.bytes_read)}, writes "
        f"{size_text(forecast.bytes_written)}; one after the other they would read {size_text(forecast.apart_read)} "
        f"and write {size_text(forecast.apart_written)}"
    )
    return lines


def _most_passes(step: Step) -> int:
    return max((passes(entry) for entry in step.plan.entries), default=1)


def _types(step: Step) -> list[str]:
    return list(dict.fromkeys(entry.dtype.name for entry in step.plan.entries if entry.dtype.floating))


def _where(step: Step, prepared: Prepared) -> str:
    if step.name not in prepared.kept:
        return "computed where it is needed"
    kept = prepared.kept[step.name]
    return f"kept, read from {kept.folder}" if kept.there else f"made, and kept in {kept.folder}"


def within(entry: Entry, prepared: Prepared) -> list[tuple[str, Entry, Plan]]:
    """The tensors of merges within the recipe that a tensor is made of, nearest first, each with its merge."""
    steps = {step.name: step.plan for step in prepared.steps}
    found: dict[tuple[str, str], tuple[str, Entry, Plan]] = {}
    left = [(entry, prepared.plan)]
    while left:
        one, plan = left.pop(0)
        for source in one.sources:
            name, tensor = plan.models[source.model].published, source.tensor.name
            if name in steps and (name, tensor) not in found:
                inner = next(other for other in steps[name].entries if other.name == tensor)
                found[name, tensor] = (name, inner, steps[name])
                left.append((inner, steps[name]))
    return list(found.values())


def steps_json(prepared: Prepared) -> list[dict[str, Any]]:
    """The merges within the recipe for a program, each after those that it is made of."""
    return [
        {
            "name": step.name,
            "method": step.plan.method,
            "models": [model.name for model in step.models],
            "dtypes": _types(step),
            "passes": _most_passes(step),
            "bytes": step.plan.output_bytes,
            **kept_json(prepared.kept).get(step.name, {}),
        }
        for step in prepared.steps
    ]


def kept_json(kept: Mapping[str, Kept]) -> dict[str, dict[str, Any]]:
    """Where merges are kept, and whether they were there already."""
    return {name: {"folder": str(one.folder), "reused": one.there} for name, one in kept.items()}
