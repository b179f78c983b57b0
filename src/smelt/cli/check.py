"""`smelt check RECIPE`."""

from __future__ import annotations

import json
from pathlib import Path

from smelt.cli.options import Allow, Flag, Json
from smelt.cli.show import count_text, counted, size_text, visible
from smelt.merging import prepare


def check(
    recipe: Path,
    /,
    *,
    allow: Allow = [],  # noqa: B006
    strict: Flag = False,
    trust_methods: Flag = False,
    as_json: Json = False,
) -> int:
    """Check a recipe against its models' configs and headers. No weights are read, and none are downloaded.

    Parameters
    ----------
    recipe
        The recipe, a YAML file.
    allow
        Relax a check: extra_tensor, missing_tensor or vocabulary. May be given several times.
    strict
        Make warnings errors.
    trust_methods
        Load the method files that the recipe names; they are code.
    as_json
        Print the result as JSON.
    """
    with prepare(recipe, allow=allow, strict=strict, trust_methods=trust_methods, weights=False) as prepared:
        plan = prepared.plan
        if as_json:
            tree = {"ok": True, "method": plan.method, "tensors": len(plan.entries), "parameters": plan.parameters}
            print(json.dumps({**tree, "notes": list(plan.notes), "warnings": list(plan.warnings)}, indent=1))
            return 0
        for note in plan.notes:
            print(visible(f"note: {note}"))
        for warning in plan.warnings:
            print(visible(f"warning: {warning}"))
        found = f"{counted(len(plan.models), 'model')}, {counted(len(plan.entries), 'tensor')}"
        size = f"{count_text(plan.parameters)} parameters, {size_text(plan.output_bytes)} to write"
        print(visible(f"{recipe}: sound. {plan.method} of {found}, {size}"))
    return 0
