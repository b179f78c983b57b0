"""The model card: a README.md whose front matter the hub's lineage reads, and the recipe in words and in full."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from smelt._version import __version__
from smelt.methods import api
from smelt.planning.entries import Plan
from smelt.recipe.canonical import to_yaml

CARD = "README.md"
_PLAIN = re.compile(r"[A-Za-z][\w.-]*(?:/[\w.-]+)?", re.ASCII)
_SPECIAL = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
"""Words that YAML reads as something else than text."""
_LICENCE = ("license", "license_name", "license_link")


def card(
    plan: Plan,
    *,
    name: str,
    recipe: Mapping[str, Any],
    donor_card: bytes | None,
    library: str | None,
    steps: Mapping[str, Plan] | None = None,
) -> bytes:
    """The card of the merged model `name`. `recipe` is its canonical form, `donor_card` the donor's card, if any.

    `library` is the one that loads the model, if that is known. `steps` are the plans of the merges within the recipe,
    by name.
    """
    text = to_yaml(recipe)
    front = ["---", "base_model:"]
    within = [(step, model) for step, inner in (steps or {}).items() for model in inner.models]
    stored = [model for model in (*plan.models, *(model for _, model in within)) if not model.merged]
    names = dict.fromkeys(model.repository or model.published for model in stored)
    front += [f"- {_quoted(name)}" for name in names]
    front += ["base_model_relation: merge"]
    donor = (donor_card or b"").decode("utf-8-sig", "replace")  # only plain words of it are taken over
    front += [f"{key}: {_quoted(value)}" for key in _LICENCE if (value := _front_value(donor, key))]
    if library is not None:
        front.append(f"library_name: {library}")
    front += ["tags:", "- merge", "- smelt", "---"]
    info = api.get(plan.method)
    published = [model.published for model in plan.models]
    lines = [
        "",
        f"# {name}",
        "",
        f"A merge made with smelt {__version__}, method `{info.name}` ({info.source}).",
        "",
        info.summary,
        "",
        "| model | role |",
        "|---|---|",
        *(f"| {_cell(model.published)} | {_role(index, plan)} |" for index, model in enumerate(plan.models)),
        *([f"| {_cell(plan.tokenizer)} | tokenizer |"] if plan.tokenizer not in published else []),
        *(f"| {_cell(model.published)} | in `{step}` ({(steps or {})[step].method}) |" for step, model in within),
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
    return "\n".join([*front, *lines]).encode()


def _role(index: int, plan: Plan) -> str:
    merged = ["merge of this recipe"] if plan.models[index].merged else []
    gives = ["config"] if index == plan.donor else []
    gives += ["tokenizer"] if plan.models[index].published == plan.tokenizer else []
    roles = [*(["base"] if index == plan.base else []), *([" and ".join(gives)] if gives else [])]
    return ", ".join([*merged, *roles]) or "model"


def _quoted(name: str) -> str:
    """Text as a YAML value."""
    plain = _PLAIN.fullmatch(name) and name.lower() not in _SPECIAL
    return name if plain else json.dumps(name, ensure_ascii=False)


def _cell(name: str) -> str:
    """Text as a cell of a Markdown table."""
    return name.replace("|", "\\|").replace("\n", " ")


def _front_value(text: str, key: str) -> str | None:
    """A plain one-line value of a card's front matter."""
    if not text.startswith("---"):
        return None
    front = text[3:].split("\n---", 1)[0]
    found = re.search(rf"^{key}:[ \t]*([\"']?)([A-Za-z0-9][\w.:/-]*)\1[ \t]*(?:#.*)?\r?$", front, re.MULTILINE)
    return found[2] if found else None
