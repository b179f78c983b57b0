"""The parts of a model with several stacks (text decoder, vision tower, encoder), which recipes name in `modules:`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from smelt.errors import nearest
from smelt.planning.anatomy import Anatomy, Role

_ALIASES = {
    "text_decoder": r"text|language|decoder|lm",
    "text_model": r"text|language|decoder|lm",
    "language_model": r"text|language|decoder|lm",
    "decoder": r"decoder",
    "text_encoder": r"encoder|text",
    "encoder": r"encoder",
    "vision_tower": r"vision|visual|image",
    "vision_model": r"vision|visual|image",
    "vision_encoder": r"vision|visual|image",
    "visual": r"vision|visual|image",
    "multi_modal_projector": r"projector|merger|connector|aligner",
    "projector": r"projector|merger|connector|aligner",
}
"""What recipes call a part -> what checkpoints call it."""


def part_of(anatomy: Anatomy) -> dict[str, str]:
    """Tensor name -> the name of its part: the component of its name in which the model's stacks differ.

    A model with one stack is one part, `model`. The input embedding and the head belong to the main stack's part.
    """
    stacks = [stack.split(".") for stack in anatomy.stacks]
    if len(stacks) < 2:
        return dict.fromkeys(anatomy.parts, "model")
    depth = 0
    while len({tuple(components[: depth + 1]) for components in stacks}) == 1:
        depth += 1
    prefix = stacks[0][:depth]
    home = anatomy.main.split(".")[depth] if anatomy.main is not None else None
    found = {}
    for name, part in anatomy.parts.items():
        components = name.split(".")
        inside = components[:depth] == prefix and len(components) > depth + 1
        outer = components[depth] if inside else components[0]
        belongs = part.stack is None and part.role in (Role.EMBEDDING, Role.HEAD, Role.AFTER) and home is not None
        if belongs and (part.role is not Role.AFTER or not inside):
            outer = home or outer
        found[name] = outer
    return found


def find_part(word: str, parts: Iterable[str], *, main: str | None) -> str | None:
    """The part that a recipe means by `word`, or None: its own name, a common name for it, or the only one near it."""
    known = sorted(set(parts))
    if word in known:
        return word
    if len(known) == 1 and word == "default":  # what MergeKit calls the part of a model that has one
        return known[0]
    pattern = _ALIASES.get(word)
    if pattern is not None:
        fits = [name for name in known if re.search(pattern, name)]
        if main in fits and re.search("text|language|decoder", word):
            return main
        if len(fits) == 1:
            return fits[0]
        if not fits and main is not None and re.search("text|language|decoder", word):
            return main
    return None


def near_part(word: str, parts: Iterable[str]) -> str:
    """What to write instead of a part that there is not."""
    known = sorted(set(parts))
    close = nearest(word, [*known, *_ALIASES])
    return f"did you mean `{close}`?" if close else f"the parts are {', '.join(known)}"
