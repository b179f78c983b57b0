"""The plan for a human and for a program: what each tensor gets, with which numbers, and where they come from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from smelt.planning.entries import Action, Entry, Plan


def number_text(value: Any) -> str:
    """A parameter's value as a person would write it: 0.5, true, [0.5, 0.25].

    >>> number_text((0.5, 1 / 3))
    '[0.5, 0.333333]'
    """
    if isinstance(value, tuple):
        return "[" + ", ".join(number_text(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def recipe_of(entry: Entry, plan: Plan) -> str:
    """In one line what happens to a tensor: the method, its inputs, its numbers."""
    if entry.action is Action.MERGE:
        settings = "  ".join(f"{name}={number_text(value)}" for name, value in entry.values.items())
        return f"{entry.method}({', '.join(_input_names(entry, plan))})  {settings}".rstrip()
    model = plan.models[entry.inputs[0].model].published
    layer = _layer_text(entry)
    return f"copy of {model}{layer}: {entry.reason}"


def _layer_text(entry: Entry) -> str:
    source = entry.inputs[0].tensor.name
    return f" {source}" if source != entry.name else ""


def _input_names(entry: Entry, plan: Plan) -> list[str]:
    names = [
        plan.models[source.model].published + _other_name(source.tensor.name, entry.name) for source in entry.inputs
    ]
    if entry.base is not None:
        names.append(f"base {plan.models[entry.base.model].published}{_other_name(entry.base.tensor.name, entry.name)}")
    return names


def _other_name(stored: str, output: str) -> str:
    return "" if stored == output else f":{stored}"


def groups(plan: Plan) -> list[tuple[str, list[Entry]]]:
    """Entries that get the same treatment, under a pattern of their names: `model.layers.{0-31}.mlp.up_proj.weight`."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    for entry in plan.entries:
        pattern = _NUMBER.sub(".*.", entry.name) if entry.part.stack else entry.name
        found.setdefault((pattern, str(entry.shape), entry.dtype.code, recipe_of(entry, plan)), []).append(entry)
    result = []
    for (pattern, *_), entries in found.items():
        layers = [entry.part.layer for entry in entries if entry.part.layer is not None]
        name = pattern
        if len(entries) == 1:
            name = entries[0].name
        elif entries[0].part.stack is not None and pattern.count("*") == 1:
            name = pattern.replace("*", "{" + spans(layers) + "}")
        elif entries[0].part.stack is not None:
            name = pattern.replace("*", "{" + spans(sorted(set(layers))) + "}", 1)
        result.append((name, entries))
    return result


_NUMBER = re.compile(r"(?<=.)\.\d+\.")


def spans(numbers: Iterable[int]) -> str:
    """Numbers in short: 0-3, 7.

    >>> spans([0, 1, 2, 3, 7])
    '0-3,7'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def entry_json(entry: Entry, plan: Plan) -> dict[str, Any]:
    """One entry for a program."""
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "dtype": entry.dtype.name,
        "bytes": entry.nbytes,
        "role": entry.part.role.value,
        "layer": entry.part.layer,
        "action": entry.action.value,
        "method": entry.method if entry.action is Action.MERGE else None,
        "values": {name: list(v) if isinstance(v, tuple) else v for name, v in entry.values.items()},
        "inputs": [_input_json(source, plan) for source in entry.inputs],
        "base": None if entry.base is None else _input_json(entry.base, plan),
        "reason": entry.reason or None,
    }


def _input_json(source: Any, plan: Plan) -> dict[str, Any]:
    tensor = source.tensor
    return {"model": plan.models[source.model].published, "tensor": tensor.name, "dtype": tensor.dtype.name}


def plan_json(plan: Plan) -> dict[str, Any]:
    """The whole plan for a program."""
    return {
        "method": plan.method,
        "recipe": plan.recipe_digest,
        "models": [
            {"name": model.published, "given": model.ref.text, "place": model.place, "commit": model.commit}
            for model in plan.models
        ],
        "donor": plan.models[plan.donor].published,
        "base": None if plan.base is None else plan.models[plan.base].published,
        "layers": {stack: list(layers) for stack, layers in plan.restacked.items()},
        "parameters": plan.parameters,
        "bytes_in": plan.input_bytes,
        "bytes_out": plan.output_bytes,
        "tensors": [entry_json(entry, plan) for entry in plan.entries],
        "ignored": dict(plan.ignored),
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }


def explanation(entry: Entry, plan: Plan) -> str:
    """How each number of a tensor came about: which setting, at which level, by which case and gradient."""
    lines = [f"{entry.name}  {list(entry.shape)} {entry.dtype}", f"  {recipe_of(entry, plan)}"]
    for source in entry.inputs:
        lines.append(f"  input  {plan.models[source.model].published}  {source.tensor}")
    if entry.base is not None:
        lines.append(f"  base   {plan.models[entry.base.model].published}  {entry.base.tensor}")
    for name, value in entry.values.items():
        origin = entry.origins.get(name)
        if isinstance(value, tuple):
            origins = origin or (None,) * len(value)
            for source, number, found in zip(entry.inputs, value, origins, strict=True):
                lines.append(
                    f"  {name} of {plan.models[source.model].published} = {number_text(number)}  {_origin(found)}"
                )
        else:
            lines.append(f"  {name} = {number_text(value)}  {_origin(origin)}")
    return "\n".join(lines)


def _origin(found: Any) -> str:
    return "the default" if found is None else str(found)


def explanation_json(entry: Entry, plan: Plan) -> dict[str, Any]:
    """`explanation` for a program."""
    tree = entry_json(entry, plan)
    tree["origins"] = {
        name: [_origin(one) for one in found] if isinstance(found, tuple) else _origin(found)
        for name, found in entry.origins.items()
    }
    return tree
