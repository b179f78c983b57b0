"""`smelt methods [NAME]`, from the declarations alone."""

from __future__ import annotations

import json
from typing import Any

from smelt.cli.options import Json
from smelt.cli.show import table
from smelt.errors import RecipeError, nearest
from smelt.methods import api
from smelt.methods.fields import Field


def methods(name: str | None = None, /, *, as_json: Json = False) -> int:
    """List the merge methods, or explain one.

    Of one: its equation, parameters, use and source, and an example recipe.

    Parameters
    ----------
    name
        The method to explain; without it all are listed.
    as_json
        Print the result as JSON.
    """
    if name is not None and name not in api.names():
        close = nearest(name, api.names())
        raise RecipeError(
            f"there is no method '{name}'",
            fix=f"did you mean {close}?" if close else f"methods are {', '.join(api.names())}",
        )
    found = [api.get(one) for one in ([name] if name else api.names())]
    if as_json:
        print(json.dumps([_as_json(info) for info in found], indent=1))
    elif name is None:
        print(table([[info.name, info.summary] for info in found], indent=""))
        print("\n`smelt methods NAME` explains one.")
    else:
        print(page(found[0]))
    return 0


def page(info: api.MethodInfo) -> str:
    """All about one method, as plain text."""
    rows = [[field.name, kind_text(field), default_text(field), field.doc] for field in info.fields.values()]
    base = {"none": "no base needed", "optional": "a base is optional", "required": "a base is needed"}[info.base]
    lines = [
        info.name,
        "=" * len(info.name),
        "",
        info.doc,
        "",
        f"Models: {info.arity()}; {base}.",
        f"Source: {info.source}",
    ]
    if rows:
        lines += ["", "Parameters:", table([["name", "type", "default", "meaning"], *rows])]
    return "\n".join(lines)


def kind_text(field: Field) -> str:
    """A field's type and range in words: `float in [0, 1], per model`."""
    if field.kind == "word":
        return " or ".join(field.words)
    text = field.kind + "".join(f" or {word}" for word in field.words)
    if field.within is not None:
        text += f" in {field.within.text}"
    return f"{text}, per model" if field.per_model else text


def default_text(field: Field) -> str:
    """A field's default as a recipe writes it."""
    if field.is_required:
        return "required"
    return str(field.default).lower() if isinstance(field.default, bool | str) else f"{field.default:g}"


def _as_json(info: api.MethodInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "summary": info.summary,
        "doc": info.doc,
        "source": info.source,
        "base": info.base,
        "models": {"least": info.models[0], "most": info.models[1]},
        "parameters": [
            {
                "name": field.name,
                "type": field.kind,
                "words": list(field.words),
                "range": field.within.text if field.within else None,
                "per_model": field.per_model,
                "required": field.is_required,
                "default": None if field.is_required else field.default,
                "doc": field.doc,
            }
            for field in info.fields.values()
        ],
    }
