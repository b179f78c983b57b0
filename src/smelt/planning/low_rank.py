"""Files of low-rank factors (LoRA and its kin), known by the names of their tensors, and what merging them means.

A pair A [r, in], B [out, r] stands for the update (alpha / r) · B·A of a weight. Averaging A and B each by itself gives
mean(B) · mean(A), which is not the mean of the products: that holds cross terms of one file's B with another's A. The
scale alpha is a third factor; it is copied, and must be the same in every file.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence

from smelt.planning.entries import Action, Entry

_FACTOR = re.compile(
    r"(?P<module>.+?)[._](?P<factor>lora_(?:embedding_)?[AB]|lora[._](?:down|up|mid)|(?:hada|lokr)_[wt][12](?:_[ab])?)"
    r"(?:\.[\w-]+)*"
)
_PARTNERS = (
    ("lora_A", "lora_B"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("hada_w1_a", "hada_w1_b"),
    ("lokr_w1", "lokr_w2"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
)
_SHOWN = 3


def factored(entries: Sequence[Entry]) -> str | None:
    """The warning for pairs of factors that are merged one by one; None where there are none."""
    factors: dict[str, set[str]] = {}
    for entry in entries:
        found = _FACTOR.fullmatch(entry.name)
        if found and entry.action is Action.MERGE and len(entry.sources) > 1:
            factors.setdefault(found["module"], set()).add(found["factor"])
    pairs = {module: kind for module, kinds in factors.items() if (kind := _pair(kinds)) is not None}
    if not pairs:
        return None
    names = ", ".join(list(pairs)[:_SHOWN]) + (f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else "")
    kinds = " and ".join(dict.fromkeys("/".join(pair) for pair in pairs.values()))
    count = "1 pair of low-rank factors is" if len(pairs) == 1 else f"{len(pairs)} pairs of low-rank factors are"
    return (
        f"{count} merged factor by factor ({kinds}), which is not the merge of the updates that their products stand "
        f"for: {names}; for that, apply each file to its model first, and merge the models"
    )


def _pair(kinds: Container[str]) -> tuple[str, str] | None:
    return next((pair for pair in _PARTNERS if all(kind in kinds for kind in pair)), None)


def is_scale(name: str, models: Sequence[Mapping[str, object]]) -> bool:
    """Whether `name` is the scale (alpha) beside a pair of factors in one of the models (name -> tensor)."""
    module, _, leaf = name.rpartition(".")
    if leaf != "alpha" or not module:
        return False
    return any(f"{module}.{factor}" in tensors for tensors in models for factor in _BESIDE_ALPHA)


_BESIDE_ALPHA = (
    "lora_down.weight",
    "lora_up.weight",
    "lora_A.weight",
    "lora_B.weight",
    "lora.down.weight",
    "lora.up.weight",
    "hada_w1_a",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w2_a",
)
