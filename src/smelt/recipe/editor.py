"""The JSON schema of the recipe language, for editors: every key, every method, every parameter with its range."""

from __future__ import annotations

import math
from typing import Any

from smelt.dtypes import OUTPUT_NAMES
from smelt.methods import api
from smelt.methods.fields import Field
from smelt.recipe.schema import Recipe

_CASES = (str.lower, str.capitalize, str.upper)
_WORDS: dict[str, Any] = {
    "NumberAsText": {"type": "string", "pattern": r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"},
    "BooleanAsText": {"enum": [0, 1, *(case(word) for word in ("yes", "no", "on", "off") for case in _CASES)]},
}
"""What stands for a number or a boolean in YAML 1.1, and in recipes."""
_ANY = {"type": ["number", "string", "boolean", "array"]}


def editor_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12). It is looser than smelt: what depends on models or on a method is not in it."""
    tree = Recipe.model_json_schema()
    tree["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    tree["title"] = "smelt recipe"
    method = {
        "description": "How the models are merged.",
        "oneOf": [{"const": name, "description": api.get(name).summary} for name in api.names()],
    }
    names = [*OUTPUT_NAMES, *(f"torch.{name}" for name in OUTPUT_NAMES)]
    for merge in (tree, tree["$defs"]["Step"]):
        merge["properties"]["merge_method"] = method
        for key in ("dtype", "out_dtype"):
            merge["properties"][key] = {"enum": [*names, None], "description": "The type of the output's numbers."}
    parameters = {"type": ["object", "null"], "properties": _parameters(), "additionalProperties": False}
    for node in (tree, *tree.get("$defs", {}).values()):
        if "parameters" in node.get("properties", {}):
            node["properties"]["parameters"] = {"$ref": "#/$defs/Parameters"}
    tree["$defs"] |= {**_WORDS, "Parameters": parameters}
    return tree


def _parameters() -> dict[str, Any]:
    """Every parameter of every method; where methods share a name, what they all allow."""
    found: dict[str, list[tuple[str, Field | None, str]]] = {}
    for method in api.names():
        info = api.get(method)
        for name, field in info.fields.items():
            found.setdefault(name, []).append((method, field, field.doc))
        for name, reason in info.ignored.items():
            found.setdefault(name, []).append((method, None, reason))
    tree = {}
    for name, uses in sorted(found.items()):
        methods = ", ".join(dict.fromkeys(method for method, field, _ in uses if field is not None))
        doc = next((doc for _, field, doc in uses if field is not None), uses[0][2])
        values = [_value(field) for _, field, _ in uses if field is not None] or [_ANY]
        plain = [value for i, value in enumerate(values) if value not in values[:i]]
        one = plain[0] if len(plain) == 1 else {"anyOf": plain}
        gradient = {"type": "array", "minItems": 1, "items": one}
        case = {
            "type": "object",
            "additionalProperties": False,
            "required": ["value"],
            "properties": {
                "filter": {"type": ["string", "null"]},
                "match": {"type": "string"},
                "value": {"anyOf": [one, gradient]},
            },
        }
        tree[name] = {
            "description": f"{doc} ({methods})" if methods else f"accepted without effect: {doc}",
            "anyOf": [one, gradient, {"type": "array", "minItems": 1, "items": case}, case],
        }
    return tree


def _value(field: Field) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "integer" if field.kind == "int" else "number"}
    if field.within is not None:
        low = "exclusiveMinimum" if field.within.open_low else "minimum"
        high = "exclusiveMaximum" if field.within.open_high else "maximum"
        if math.isfinite(field.within.low):
            value[low] = field.within.low
        if math.isfinite(field.within.high):
            value[high] = field.within.high
    others: list[dict[str, Any]] = [{"$ref": "#/$defs/NumberAsText"}]
    if field.kind == "bool":
        value, others = {"type": "boolean"}, [{"$ref": "#/$defs/BooleanAsText"}]
    if field.kind == "word":
        return {"enum": list(field.words)}
    if field.words:
        others.append({"enum": list(field.words)})
    return {"anyOf": [value, *others]}
