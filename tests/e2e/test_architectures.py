"""Tiny models of many architectures: each merges, keeps its names on disk, and loads with nothing left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import smelt
from architectures import ARCHITECTURES, assert_clean, load, make


def stored(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_merges_and_loads(name: str, tmp_path: Path) -> None:
    base, one, two = make(name, tmp_path / "models", count=3)
    out = tmp_path / "out"
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [
            {"model": str(one), "parameters": {"weight": 0.75}},
            {"model": str(two), "parameters": {"weight": 0.5}},
        ],
    }
    smelt.merge(recipe, out, strict=True)
    _, info = load(name, out)
    assert_clean(info)
    merged, b, m1, m2 = stored(out), stored(base), stored(one), stored(two)
    assert set(merged) == set(b)
    for key, value in merged.items():
        assert value.dtype == b[key].dtype
        if not value.is_floating_point():
            assert (value == b[key]).all()
            continue
        wanted = (
            b[key].double() + 0.75 * (m1[key].double() - b[key].double()) + 0.5 * (m2[key].double() - b[key].double())
        )
        assert np.allclose(value.double().numpy(), wanted.numpy(), rtol=1e-5, atol=1e-6), key
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config == json.loads((base / "config.json").read_text(encoding="utf-8"))  # nothing rewritten, nothing lost


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "gemma3", "mamba"])
def test_bfloat16_out_is_stated_in_the_config(name: str, tmp_path: Path) -> None:
    base, one = make(name, tmp_path / "models", count=2)
    out = tmp_path / "out"
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(base)}, {"model": str(one)}],
        "parameters": {"weight": 1},
        "out_dtype": "bfloat16",
    }
    smelt.merge(recipe, out, shard_bytes=40_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    model, info = load(name, out)
    assert_clean(info)
    assert str(model.dtype) == "torch.bfloat16"
    with safe_open(next(out.glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


STACKED = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "phi3", "mixtral", "qwen3_moe", "mamba"]


@pytest.mark.parametrize("name", STACKED)
def test_layers_can_be_stacked(name: str, tmp_path: Path) -> None:
    one, two = make(name, tmp_path / "models", count=2)
    layers = 2
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(one), "layer_range": [0, layers]}]},
            {"sources": [{"model": str(two), "layer_range": [0, layers]}]},
        ],
    }
    out = tmp_path / "out"
    smelt.merge(recipe, out)
    model, info = load(name, out)
    assert_clean(info)
    assert model.config.get_text_config().num_hidden_layers == 2 * layers
