"""`lineage.record`: what an output was made of, as JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import factory
from smelt.lineage.record import FORMAT, file_digest, record
from smelt.planning.build import build
from smelt.planning.entries import Plan
from smelt.recipe.canonical import canonical
from smelt.recipe.parse import from_dict
from smelt.storage.checkpoint import FileInfo
from smelt.storage.layout import OutputTensor, layout

BUFFER = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
MODELS = factory.opened(**{f"m{i}": (factory.llama(seed=i) | BUFFER, factory.config()) for i in range(2)})
TREE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "m0",
    "models": [{"model": "m1", "parameters": {"weight": 0.5}}],
}


def made(plan: Plan, *, shard_bytes: int = 10**6, **changes: Any) -> dict[str, Any]:
    shards = layout([OutputTensor(e.name, e.dtype, e.shape) for e in plan.entries], shard_bytes=shard_bytes)
    info = FileInfo("model.safetensors", 100, "d" * 32, Path("/secret/model.safetensors"), (100, 1, 2))
    keys: dict[str, Any] = {
        "recipe": canonical(from_dict(TREE)),
        "inputs": [[info], [info]],
        "hashes": {(1, "model.safetensors"): "a" * 64},
        "tensors": {entry.name: f"digest of {entry.name}" for entry in plan.entries},
        "nonfinite": {"model.norm.weight": 3},
        "companions": {"config.json": file_digest(b"{}")},
        "method_files": {},
    }
    raw = record(plan, shards, **(keys | changes))
    assert raw.endswith(b"}\n")
    assert b"/secret" not in raw
    return json.loads(raw)


def planned(seed: int = 0) -> Plan:
    return build(from_dict(TREE), MODELS, seed=seed)


def test_what_it_holds() -> None:
    plan = planned(seed=5)
    found = made(plan)
    assert found["format"] == FORMAT
    assert found["recipe"] == {"digest": plan.recipe_digest, "text": TREE, "seed": 5}
    assert [(entry["model"], entry["role"]) for entry in found["inputs"]] == [("m1", "model"), ("m0", "base")]
    first = found["inputs"][0]["files"][0]
    assert first == {"name": "model.safetensors", "size": 100, "header": "d" * 32, "sha256": None}
    assert found["inputs"][1]["files"][0]["sha256"] == "a" * 64
    assert found["donor"] == "m0"
    assert found["files"]["config.json"] == {"sha256": hashlib.sha256(b"{}").hexdigest()}
    assert found["tensors"].keys() == {entry.name for entry in plan.entries}


def test_tensors_tell_how_they_came_about() -> None:
    tensors = made(planned())["tensors"]
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    assert (up["action"], up["method"], up["digest"]) == (
        "merge",
        "ties",
        "digest of model.layers.0.mlp.up_proj.weight",
    )
    assert up["values"] == {
        "weight": [0.5],
        "density": [1.0],
        "normalize": True,
        "rescale": False,
        "lambda": 1.0,
        "granularity": "tensor",
    }
    assert [source["model"] for source in up["inputs"]] == ["m1"]
    assert up["base"]["model"] == "m0"
    assert (up["nonfinite"], tensors["model.norm.weight"]["nonfinite"]) == (0, 3)
    buffer = tensors[next(iter(BUFFER))]
    assert (buffer["action"], buffer["values"], buffer["method"]) == ("copy", {}, None)
    assert "buffer" in buffer["reason"]


def test_files_of_shards() -> None:
    found = made(planned(), shard_bytes=1000)
    shards = [name for name in found["files"] if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert sum(found["files"][name]["tensors"] for name in shards) == len(found["tensors"])
    assert found["files"][factory.INDEX].keys() == {"sha256"}
    assert factory.INDEX not in made(planned())["files"]


def test_letters_and_notes_survive() -> None:
    plan = replace(planned(), notes=("ünï ✓",), warnings=("careful",), ignored={"m1: x": "why"})
    found = made(plan)
    assert (found["notes"], found["warnings"], found["ignored"]) == (["ünï ✓"], ["careful"], {"m1: x": "why"})


def test_the_same_twice() -> None:
    assert made(planned()) == made(planned())
