"""`smelt plan RECIPE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smelt.cli.show import count_text, size_text, table
from smelt.merging import Prepared, prepare
from smelt.planning.entries import PlannedModel
from smelt.planning.explain import groups, plan_json, recipe_of
from smelt.recipe.schema import Relaxation


def plan(
    recipe: Path,
    /,
    *,
    threads: int | None = None,
    seed: Annotated[int, Parameter(name=["--seed", "--random-seed"])] = 0,
    allow: Annotated[list[Relaxation], Parameter(negative="")] = [],  # noqa: B006
    strict: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Show what a merge would do: what each tensor gets with which numbers, bytes, passes and memory.

    Reads headers and configs only. Tensors that get the same treatment share a line.

    Parameters
    ----------
    recipe
        The recipe, a YAML file.
    threads
        Worker threads the prediction is for; all cores by default.
    seed
        Seed of the random methods.
    allow
        Relax a check: extra_tensor, missing_tensor or vocabulary. May be given several times.
    strict
        Make warnings errors.
    as_json
        Print the whole plan as JSON.
    """
    with prepare(recipe, allow=allow, strict=strict, seed=seed, workers=threads) as prepared:
        if as_json:
            tree = plan_json(prepared.plan)
            for row in tree["tensors"]:
                row["passes"] = prepared.forecast.passes[row["name"]]
            tree["forecast"] = {
                "bytes_read": prepared.forecast.bytes_read,
                "bytes_written": prepared.forecast.bytes_written,
                "memory": prepared.forecast.memory,
                "threads": prepared.forecast.workers,
            }
            print(json.dumps(tree, indent=1))
        else:
            print(_text(prepared))
    return 0


def _text(prepared: Prepared) -> str:
    plan, forecast = prepared.plan, prepared.forecast
    lines = [f"method  {plan.method}", "models"]
    lines.append(table([[_role(i, prepared), m.published, _place(m)] for i, m in enumerate(plan.models)]))
    rows = []
    for name, entries in groups(plan):
        first = entries[0]
        passes = forecast.passes[first.name]
        rows.append(
            [
                name,
                f"{len(entries)} ×" if len(entries) > 1 else "",
                f"{list(first.shape)} {first.dtype}",
                f"{passes} pass{'es' if passes > 1 else ''}",
                recipe_of(first, plan),
            ]
        )
    lines += ["tensors", table(rows)]
    layers = "".join(f", {len(layers)} layers in {stack}" for stack, layers in plan.restacked.items())
    lines.append(f"{len(plan.entries)} tensors, {count_text(plan.parameters)} parameters{layers}")
    lines.append(
        f"reads {size_text(forecast.bytes_read)}, writes {size_text(forecast.bytes_written)}, "
        f"at most about {size_text(forecast.memory)} of memory with {forecast.workers} threads"
    )
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def _role(index: int, prepared: Prepared) -> str:
    plan = prepared.plan
    return "base" if index == plan.base else "model"


def _place(model: PlannedModel) -> str:
    return f"hub, commit {model.commit[:12]}" if model.commit else model.place
