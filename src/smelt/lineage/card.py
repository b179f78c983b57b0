"""The model card: a README.md whose front matter the hub's lineage reads, and the recipe in words and in full."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from smelt._version import __version__
from smelt.methods import api
from smelt.planning.entries import Plan
from smelt.recipe.canonical import to_yaml

CARD = "README.md"
_PLAIN = re.compile(r"[A-Za-z0-9][\w./-]*")


def card(plan: Plan, *, name: str, recipe: Mapping[str, Any], donor_card: str | None, has_config: bool) -> bytes:
    """The card of the merged model `name`. `recipe` is its canonical form, `donor_card` the donor's card, if any."""
    text = to_yaml(recipe)
    front = ["---", "base_model:"]
    front += [f"- {_quoted(model.published)}" for model in plan.models]
    front += ["base_model_relation: merge"]
    licence = _front_value(donor_card, "license")
    if licence:
        front.append(f"license: {licence}")
    if has_config:
        front.append("library_name: transformers")
    front += ["tags:", "- merge", "- smelt", "---"]
    info = api.get(plan.method)
    lines = [
        "",
        f"# {name}",
        "",
        f"A merge made with smelt {__version__}, method [{info.name}] ({info.source}).",
        "",
        info.summary,
        "",
        "| model | role |",
        "|---|---|",
        *(f"| {model.published} | {_role(index, plan)} |" for index, model in enumerate(plan.models)),
        "",
        "## Recipe",
        "",
        "```yaml",
        text.rstrip(),
        "```",
        "",
        f"Recipe digest `{plan.recipe_digest}`, seed {plan.seed}. `smelt.json` beside this card holds what went into "
        "every tensor and its digest; `smelt verify` checks the files against it.",
        "",
    ]
    return "\n".join([*front, *lines]).replace(f"[{info.name}]", f"`{info.name}`").encode()


def _role(index: int, plan: Plan) -> str:
    roles = []
    if index == plan.base:
        roles.append("base")
    if index == plan.donor:
        roles.append("config and tokenizer")
    return ", ".join(roles) or "model"


def _quoted(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _front_value(text: str | None, key: str) -> str | None:
    """A plain one-line value of a card's front matter."""
    if text is None or not text.startswith("---"):
        return None
    front = text[3:].split("\n---", 1)[0]
    found = re.search(rf"^{key}:[ \t]*([A-Za-z0-9][\w.-]*)[ \t]*$", front, re.MULTILINE)
    return found[1] if found else None
