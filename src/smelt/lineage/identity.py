"""What makes two runs the same merge: a run may go on with the output of another only where all of this agrees."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from smelt._version import __version__
from smelt.errors import SmeltError
from smelt.lineage.record import file_digest
from smelt.methods import api
from smelt.planning.entries import Plan
from smelt.planning.explain import entry_json
from smelt.storage import files
from smelt.storage.checkpoint import FileInfo
from smelt.storage.layout import Layout

FORMAT = 1
_CODE_LIMIT = 16 << 20


def identity(
    plan: Plan,
    layout: Layout,
    *,
    inputs: Sequence[Sequence[FileInfo]],
    merges: Mapping[str, tuple[Plan, Sequence[Sequence[FileInfo]]]] | None = None,
    allow: Iterable[str],
    shard_bytes: int,
    companions: Mapping[str, bytes],
    method_files: Mapping[str, str],
) -> dict[str, Any]:
    """The head of the journal of a merge, as JSON values.

    `inputs` gives each model's weight files: they count with header digest, size, time and inode, so that a file that
    was replaced or edited is another. `merges` are the plans of the merges within the recipe, each with its models'
    files. `companions` are the small files that will stand beside the weights.
    """
    within = merges or {}
    foreign = [_foreign(one) for one in (plan, *(step for step, _ in within.values()))]
    return {
        "format": FORMAT,
        "smelt": __version__,
        "numpy": np.__version__,
        "recipe": plan.recipe_digest,
        "seed": plan.seed,
        "allow": sorted(allow),
        "shard size": shard_bytes,
        "methods": {**method_files, **{name: sha for found in foreign for name, sha in found.items()}},
        "input": _stamps(plan, inputs) | {name: at for one in within.values() for name, at in _stamps(*one).items()},
        "small file": {name: file_digest(content) for name, content in companions.items()},
        "plan": _plan_digest(plan, layout),
        **({"merges": {name: _plan_digest(step) for name, (step, _) in within.items()}} if within else {}),
    }


def _stamps(plan: Plan, inputs: Sequence[Sequence[FileInfo]]) -> dict[str, list[Any]]:
    """What each weight file of the plan's models is known by; merges within the recipe have none."""
    return {
        f"{model.published}/{info.name}": [info.header_digest, *info.stamp]
        for model, its in zip(plan.models, inputs, strict=True)
        for info in its
    }


def _foreign(plan: Plan) -> dict[str, str]:
    """The methods that are not smelt's own, with the sha256 of their files: smelt's version tells nothing of them."""
    found = {}
    for name in sorted({entry.method for entry in plan.entries if entry.method in api.names()}):
        definition = api.get(name).type
        if not definition.__module__.startswith("smelt."):
            found[name] = ""
            with contextlib.suppress(TypeError, SmeltError):  # defined at a prompt, with no file
                found[name] = file_digest(files.read_bytes(inspect.getfile(definition), limit=_CODE_LIMIT))
    return found


def _plan_digest(plan: Plan, layout: Layout | None = None) -> str:
    """Of every tensor with its numbers and its place: whatever else may come to decide about them."""
    digest = hashlib.sha256()
    for entry in plan.entries:
        digest.update(json.dumps(entry_json(entry, plan), sort_keys=True).encode())
        digest.update(json.dumps([source.stream for source in entry.sources]).encode())
    for shard in layout.shards if layout is not None else ():
        digest.update(xxhash.xxh3_128_digest(shard.header))
    return digest.hexdigest()
