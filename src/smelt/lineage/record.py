"""`smelt.json`: what an output was made of, so that it can be verified, repeated and traced. No local path is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import xxhash

from smelt._version import __version__
from smelt.planning.entries import Entry, Plan, PlannedModel
from smelt.planning.explain import entry_json
from smelt.storage.checkpoint import FileInfo
from smelt.storage.layout import Layout

RECORD = "smelt.json"
FORMAT = 1
DIGEST = "XXH3-128 over the XXH3-128 digests of 1 MiB blocks"


def file_digest(data: bytes) -> str:
    """The digest of a small file: sha256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def record(
    plan: Plan,
    layout: Layout,
    *,
    recipe: Mapping[str, Any],
    inputs: Sequence[Sequence[FileInfo]],
    hashes: Mapping[tuple[int, str], str],
    tensors: Mapping[str, str],
    nonfinite: Mapping[str, int],
    companions: Mapping[str, str],
    method_files: Mapping[str, str],
    trusted: Collection[str] = (),
    device: Mapping[str, str] | None = None,
    merges: Mapping[str, Plan] | None = None,
    further: Sequence[PlannedModel] = (),
) -> bytes:
    """The record as JSON.

    `inputs` gives each model's weight files, `hashes` the sha256 of a (model, file) where it is known, `tensors` the
    digest of each output tensor, `nonfinite` how many of its numbers are NaN or infinite, `companions` the sha256 of
    each small file, `method_files` that of each method file which the recipe names. Digests and counts of tensors in
    `trusted` were taken over from the record of the model that they were copied from. `device` is what the numbers were
    worked out on, if it was not the CPU. `merges` are the plans of the merges within the recipe, and `further` the
    models that only they use; in `inputs` and `hashes` these follow the plan's own.
    """
    tree: dict[str, Any] = {
        "format": FORMAT,
        "smelt": __version__,
        "recipe": {"digest": plan.recipe_digest, "text": recipe, "seed": plan.seed},
        "method": plan.method,
        "method_files": dict(method_files),
        **({"device": dict(device)} if device is not None else {}),
        "inputs": [
            {
                "model": model.published,
                "role": "base" if index == plan.base else "model",
                "commit": model.commit,
                "files": [
                    {
                        "name": info.name,
                        "size": info.size,
                        "header": info.header_digest,
                        "sha256": hashes.get((index, info.name)),
                    }
                    for info in inputs[index]
                ],
            }
            for index, model in enumerate([*plan.models, *further])
            if not model.merged
        ],
        **({"merges": {name: _made_within(step) for name, step in merges.items()}} if merges else {}),
        "donor": plan.models[plan.donor].published,
        "tokenizer": plan.tokenizer,
        "digest": DIGEST,
        "files": {
            **{
                shard.file: {
                    "size": shard.size,
                    "header": xxhash.xxh3_128_hexdigest(shard.header),
                    "tensors": len(shard.tensors),
                }
                for shard in layout.shards
            },
            **({layout.index_name: {"sha256": file_digest(layout.index)}} if layout.index is not None else {}),
            **{name: {"sha256": digest} for name, digest in companions.items()},
        },
        "tensors": {
            entry.name: {
                "digest": tensors[entry.name],
                "nonfinite": nonfinite.get(entry.name, 0),
                **({"trusted": True} if entry.name in trusted else {}),
                **made_of(entry, plan),
            }
            for entry in plan.entries
        },
        "ignored": dict(plan.ignored),
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }
    tree["checksum"] = checksum(tree)
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()


def _made_within(plan: Plan) -> dict[str, Any]:
    """What the record says of a merge within the recipe; its tensors follow from the recipe's text."""
    return {
        "method": plan.method,
        "inputs": [model.published for model in plan.models],
        "donor": plan.models[plan.donor].published,
        "tokenizer": plan.tokenizer,
    }


def checksum(tree: Mapping[str, Any]) -> str:
    """sha256 (hex) of a record without its own checksum, in one fixed form. It tells damage, not forgery."""
    rest = {key: value for key, value in tree.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def made_of(entry: Entry, plan: Plan) -> dict[str, Any]:
    """What the record says of how a tensor came about."""
    return {key: value for key, value in entry_json(entry, plan).items() if key in _KEPT}


_KEPT = {"action", "method", "values", "inputs", "base", "reason"}
