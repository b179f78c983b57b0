"""`smelt check RECIPE`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from smelt.cli.options import Allow, Flag, Json
from smelt.cli.show import count_text, counted, size_text, visible
from smelt.planning.entries import Action, Entry
from smelt.preparing import prepare

_SHOWN = 5


def check(
    recipe: Path,
    /,
    *,
    allow: Allow = [],  # noqa: B006
    strict: Flag = False,
    trust_methods: Flag = False,
    trust_pickles: Flag = False,
    as_json: Json = False,
) -> int:
    """Check a recipe from configs and headers alone.

    No weights are read, and none are downloaded.

    Parameters
    ----------
    recipe
        The recipe, a YAML file.
    allow
        Relax a check. May be given several times.
    strict
        Make warnings errors.
    trust_methods
        Load the method files that the recipe names; they are code.
    trust_pickles
        Read models that are stored as pickles, by torch in a process apart.
    as_json
        Print the result as JSON.
    """
    with prepare(
        recipe, allow=allow, strict=strict, trust_methods=trust_methods, trust_pickles=trust_pickles, weights=False
    ) as prepared:
        plan = prepared.plan
        compared = [entry for entry in plan.entries if entry.action is Action.EQUAL]
        if as_json:
            tree: dict[str, object] = {"ok": True, "method": plan.method, "tensors": len(plan.entries)}
            tree["parameters"] = plan.parameters
            tree["compared_at_merge"] = [entry.name for entry in compared]
            print(json.dumps({**tree, "notes": list(plan.notes), "warnings": list(plan.warnings)}, indent=1))
            return 0
        for note in plan.notes:
            print(visible(f"note: {note}"))
        for warning in plan.warnings:
            print(visible(f"warning: {warning}"))
        if compared:
            print(visible(f"note: {_not_compared(compared)}"))
        found = f"{counted(len(plan.models), 'model')}, {counted(len(plan.entries), 'tensor')}"
        size = f"{count_text(plan.parameters)} parameters, {size_text(plan.output_bytes)} to write"
        print(visible(f"{recipe}: sound. {plan.method} of {found}, {size}"))
    return 0


def _not_compared(entries: Sequence[Entry]) -> str:
    """What headers cannot tell: whether numbers that are never averaged are the same in all models."""
    names = [entry.name for entry in entries]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    types = " and ".join(sorted({entry.dtype.name for entry in entries}))
    return (
        f"{counted(len(names), 'tensor')} ({types}) must be the same in every model, which "
        f"is compared when merging, before anything is written: {', '.join([*names[:_SHOWN], *more])}"
    )
