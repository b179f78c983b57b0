"""`smelt plan RECIPE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smelt.cli.nested import models_of_steps, of_steps, steps_json, within
from smelt.cli.options import Allow, Flag, Json, Seed
from smelt.cli.show import count_text, counted, on_device, parse_size, size_text, table, visible
from smelt.engine.backends import CPU
from smelt.engine.forecast import FLOPS
from smelt.engine.whole import passes_of
from smelt.errors import RecipeError, nearest
from smelt.methods.api import Cost
from smelt.planning.entries import Entry, Plan, PlannedModel
from smelt.planning.explain import explanation, explanation_json, groups, plan_json, recipe_of
from smelt.planning.whole import Group, is_whole
from smelt.planning.whole import groups as whole_groups
from smelt.prepared import Prepared
from smelt.preparing import prepare


def plan(
    recipe: Path,
    /,
    *,
    explain: str | None = None,
    threads: int | None = None,
    device: str = CPU,
    memory: str | None = None,
    seed: Seed = 0,
    allow: Allow = [],  # noqa: B006
    strict: Flag = False,
    trust_methods: Flag = False,
    trust_pickles: Flag = False,
    keep_folder: Path | None = None,
    as_json: Json = False,
) -> int:
    """Show what a merge would do, without doing it.

    What each tensor gets with which numbers, bytes, passes and memory. Reads headers and configs only. Tensors that get
    the same treatment share a line.

    Parameters
    ----------
    recipe
        The recipe, a YAML file.
    explain
        A tensor (or a part of names): show how each of its numbers came about.
    threads
        Worker threads the prediction is for; all cores by default.
    device
        The device the prediction is for: cpu, cuda or cuda:1. It need not be there.
    memory
        Most memory a merge may use, such as 500MB: threads and buffers are cut to fit. No limit by default.
    seed
        Seed of the random methods.
    allow
        Relax a check. May be given several times.
    strict
        Make warnings errors.
    trust_methods
        Load the method files that the recipe names; they are code.
    trust_pickles
        Read models that are stored as pickles, by torch in a process apart.
    keep_folder
        Where merges within the recipe lie that it asks to keep; .smelt-kept in the working folder by default.
    as_json
        Print the whole plan as JSON.
    """
    with prepare(
        recipe,
        allow=allow,
        strict=strict,
        seed=seed,
        workers=threads,
        device=device,
        memory=None if memory is None else parse_size(memory),
        trust_methods=trust_methods,
        trust_pickles=trust_pickles,
        weights=False,
        keep_folder=keep_folder,
    ) as prepared:
        if explain is not None:
            print(_explained(prepared, explain, as_json=True) if as_json else visible(_explained(prepared, explain)))
        elif as_json:
            tree = plan_json(prepared.plan)
            for row in tree["tensors"]:
                row["passes"] = prepared.forecast.passes[row["name"]]
                if (cost := prepared.forecast.work.get(row["name"])) is not None:
                    row["work"] = _work_json(cost)
            tree["forecast"] = {
                "bytes_read": prepared.forecast.bytes_read,
                "bytes_written": prepared.forecast.bytes_written,
                "memory": prepared.forecast.memory,
                "threads": prepared.forecast.workers,
                "work_seconds": prepared.forecast.seconds,
            }
            if whole := whole_groups(prepared.plan.entries, tied=prepared.plan.tied):
                tree["whole"] = [_whole_json(group) for group in whole]
            if prepared.forecast.device != CPU:
                tree["forecast"]["device"] = prepared.forecast.device
                tree["forecast"]["device_memory"] = prepared.forecast.device_memory
            if prepared.steps:
                tree["merges"] = steps_json(prepared)
                tree["forecast"]["one_after_the_other"] = {
                    "bytes_read": prepared.forecast.apart_read,
                    "bytes_written": prepared.forecast.apart_written,
                }
            print(json.dumps(tree, indent=1))
        else:
            print(visible(_text(prepared)))
    return 0


def _explained(prepared: Prepared, wanted: str, *, as_json: bool = False) -> str:
    """How the numbers of one tensor came about; of several whose names contain `wanted`, one after the other."""
    entries = [entry for entry in prepared.plan.entries if entry.name == wanted]
    entries = entries or [entry for entry in prepared.plan.entries if wanted in entry.name]
    if not entries:
        names = [entry.name for entry in prepared.plan.entries]
        close = nearest(wanted, names)
        raise RecipeError(
            f"no tensor of the plan is called '{wanted}'",
            fix=f"did you mean {close}?" if close else "`smelt plan` without --explain lists them",
        )
    if as_json:
        return json.dumps([explanation_json(entry, prepared.plan) for entry in entries], indent=1)
    parts = []
    for entry in entries:
        parts.append(explanation(entry, prepared.plan) + _found_over(entry, prepared.plan))
        parts += [
            f"in the merge {name}: {explanation(one, plan)}{_found_over(one, plan)}"
            for name, one, plan in within(entry, prepared)
        ]
    return "\n\n".join(parts)


def _found_over(entry: Entry, plan: Plan) -> str:
    """A line more for a tensor whose method looks at the whole model first; else nothing."""
    for group in whole_groups(plan.entries, tied=plan.tied) if is_whole(entry) else ():
        if any(one is entry for one in group.entries):
            found = f"{counted(len(group.counted), 'tensor')}, {count_text(group.size)} parameters"
            return f"\n  merged with what {entry.method} finds over the whole model: {found}"
    return ""


def _text(prepared: Prepared) -> str:
    plan, forecast = prepared.plan, prepared.forecast
    lines = [f"method  {plan.method}", "models"]
    lines.append(
        table(
            [[_role(i, prepared), m.published, _place(m)] for i, m in enumerate(plan.models)]
            + models_of_steps(prepared)
        )
    )
    rows = []
    for name, entries in groups(plan):
        first = entries[0]
        passes = forecast.passes[first.name]
        rows.append(
            [
                name,
                f"{len(entries)} ×" if len(entries) > 1 else "",
                f"{list(first.shape)} {first.dtype}",
                f"{passes} pass{'es' if passes > 1 else ''}{_work_text(forecast.work.get(first.name))}",
                recipe_of(first, plan),
            ]
        )
    lines += ["tensors", table(rows)]
    layers = "".join(f", {len(layers)} layers in {stack}" for stack, layers in plan.restacked.items())
    lines.append(f"{counted(len(plan.entries), 'tensor')}, {count_text(plan.parameters)} parameters{layers}")
    where = on_device(forecast.device, forecast.device_memory)
    lines.append(
        f"reads {size_text(forecast.bytes_read)}, writes {size_text(forecast.bytes_written)}, "
        f"at most about {size_text(forecast.memory)} of memory with {forecast.workers} threads{where}"
    )
    for group in whole_groups(plan.entries, tied=plan.tied):
        if passes := passes_of(group):
            found = f"{counted(len(group.counted), 'tensor')}, {count_text(group.size)} parameters"
            often = (
                "1 pass over them first, which reads" if passes == 1 else f"{passes} passes over them first, which read"
            )
            lines.append(f"granularity model: {found} as one, {often} {size_text(passes * group.input_bytes)}")
    if forecast.work:
        flops = sum(cost.flops for cost in forecast.work.values())
        there = "" if forecast.device == CPU else " on the CPU"
        lines.append(
            f"linear algebra: {_flops_text(flops)}, about {forecast.seconds:.2g} s with {forecast.workers} threads "
            f"at {_flops_text(FLOPS)} a second each{there}"
        )
    lines += of_steps(prepared)
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def _work_text(cost: Cost | None) -> str:
    """What a tensor's linear algebra takes on one core, and the memory for it."""
    if cost is None:
        return ""
    return f", {_flops_text(cost.flops)}, {cost.flops / FLOPS:.2g} s, {size_text(cost.bytes)}"


def _whole_json(group: Group) -> dict[str, Any]:
    """Tensors over which reductions go together."""
    passes = passes_of(group)
    return {
        "tensors": [entry.name for entry in group.entries],
        "counted": len(group.counted),
        "parameters": group.size,
        "passes": passes,
        "bytes_read": passes * group.input_bytes,
    }


def _work_json(cost: Cost) -> dict[str, float]:
    return {"flops": cost.flops, "seconds": cost.flops / FLOPS, "bytes": cost.bytes}


def _flops_text(flops: float) -> str:
    """Floating-point operations in short: 26 GFLOP."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e3:.3g} kFLOP"


def _role(index: int, prepared: Prepared) -> str:
    plan = prepared.plan
    return "base" if index == plan.base else "model"


def _place(model: PlannedModel) -> str:
    return f"hub, commit {model.commit[:12]}" if model.commit else model.place
