"""Blockwise scaled weights of 8 bits, read as the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import factory
from factory import Array, config, llama
from smelt.dtypes import F32
from smelt.storage.sources.local import open_folder
from smelt.storage.sources.scaled import ScaledCheckpoint, read_as_weights

E4M3 = ml_dtypes.float8_e4m3fn
NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(1, 1), (128, 128), (256, 384), (129, 127), (7, 300), (300, 7), (130, 257), (2, 1000)]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def scaled(shape: tuple[int, int], block: tuple[int, int] = (128, 128), kind: Any = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    blocks = tuple(-(-length // edge) for length, edge in zip(shape, block, strict=True))
    return {
        NAME: rng.standard_normal(shape, dtype=np.float32).astype(E4M3),
        f"{NAME}_scale_inv": rng.uniform(1e-4, 1e-2, blocks).astype(np.float32).astype(kind),
    }


def meant(tensors: Mapping[str, Array], block: tuple[int, int] = (128, 128)) -> Array:
    """The weight by torch, as DeepSeek's own conversion does it."""
    stored = tensors[NAME].astype(np.float32)
    factors = torch.from_numpy(tensors[f"{NAME}_scale_inv"].astype(np.float32))
    whole = factors.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (torch.from_numpy(stored) * whole[: stored.shape[0], : stored.shape[1]]).numpy()


def opened(folder: Path, tensors: Mapping[str, Array], setting: Any = FP8) -> Any:
    settings = config() if setting is None else config(quantization_config=setting)
    return read_as_weights(open_folder(factory.model(folder, tensors, settings), name="m"))


def read(source: Any, start: int = 0, stop: int | None = None) -> bytes:
    spec = source.tensors[NAME]
    buffer = bytearray((spec.nbytes if stop is None else stop) - start)
    source.read_into(spec, start, spec.nbytes if stop is None else stop, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16], ids=lambda kind: np.dtype(kind).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_meant(tmp_path: Path, shape: tuple[int, int], kind: Any) -> None:
    tensors = scaled(shape, kind=kind)
    source = opened(tmp_path / "m", tensors)
    assert isinstance(source, ScaledCheckpoint)
    assert source.tensors[NAME].dtype is F32
    assert source.tensors[NAME].shape == shape
    assert read(source) == meant(tensors).tobytes()


@pytest.mark.parametrize("block", [(128, 128), (1, 128), (3, 5), (64, 1)], ids=str)
def test_any_part(tmp_path: Path, block: tuple[int, int]) -> None:
    """Bytes from anywhere to anywhere, not only whole elements."""
    tensors = scaled((259, 131), block)
    source = opened(tmp_path / "m", tensors, {**FP8, "weight_block_size": list(block)})
    whole = meant(tensors, block).tobytes()
    rng = np.random.default_rng(1)
    ends = [(0, 0), (len(whole), len(whole)), (1, 2), (3, 5), (131 * 4, 131 * 4 * 128), (131 * 4 * 127, 131 * 4 * 129)]
    drawn = [sorted(pair) for pair in rng.integers(0, len(whole) + 1, (200, 2)).tolist()]
    short = [(start, min(start + 9, len(whole))) for start, _ in drawn]
    for start, stop in [*ends, *drawn, *short]:
        assert read(source, start, stop) == whole[start:stop]


def test_what_is_beside(tmp_path: Path) -> None:
    """Scales and the word in the config are gone; other tensors and files are as they were."""
    tensors = llama() | scaled((12, 8))
    files = {"tokenizer.json": "{}", "LICENSE": "free"}
    folder = factory.model(tmp_path / "m", tensors, config(quantization_config=FP8), files=files)
    source = read_as_weights(open_folder(folder, name="m"))
    assert set(source.tensors) == set(tensors) - {f"{NAME}_scale_inv"}
    assert source.json("config.json") == config()
    assert json.loads(source.text("config.json") or "") == config()
    assert (source.bytes("LICENSE"), source.json("tokenizer.json"), source.text("none")) == (b"free", {}, None)
    assert source.other_files() == ["LICENSE", "config.json", "tokenizer.json"]
    spec = source.tensors["model.norm.weight"]
    buffer = bytearray(spec.nbytes)
    source.read_into(spec, 0, spec.nbytes, memoryview(buffer))
    assert bytes(buffer) == tensors["model.norm.weight"].tobytes()
    assert source.changed() == []
    with pytest.raises(ValueError, match="outside"):
        source.read_into(source.tensors[NAME], 0, 1 << 20, memoryview(bytearray(1 << 20)))
    source.close()
    with pytest.raises(ValueError, match="closed"):
        read(source)


def lost(name: str) -> dict[str, Array]:
    return {key: value for key, value in (llama() | scaled((12, 8))).items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "setting"),
    [
        (llama(), FP8),
        (llama() | scaled((12, 8)), None),
        (llama() | scaled((12, 8)), {**FP8, "quant_method": "fbgemm_fp8"}),
        (llama() | scaled((12, 8)), {**FP8, "weight_block_size": None}),
        (llama() | scaled((12, 8)), {**FP8, "weight_block_size": [128]}),
        (llama() | scaled((12, 8)), {**FP8, "weight_block_size": [0, 128]}),
        (llama() | scaled((12, 8)), {**FP8, "weight_block_size": [128.0, True]}),
        (lost(f"{NAME}_scale_inv"), FP8),
        (lost(NAME), FP8),
        (llama() | scaled((12, 8)) | {f"{NAME}_scale_inv": np.ones((1, 2), np.float32)}, FP8),
        (llama() | scaled((12, 8)) | {f"{NAME}_scale_inv": np.ones(1, np.float32)}, FP8),
        (llama() | scaled((12, 8)) | {f"{NAME}_scale_inv": np.ones((1, 1), ml_dtypes.float8_e8m0fnu)}, FP8),
        (llama() | scaled((12, 8)) | {"model.layers.0.mlp.up_proj.input_scale": np.ones(1, np.float32)}, FP8),
        (llama() | scaled((12, 8)) | {"model.norm.weight": np.ones(8, E4M3)}, FP8),
        (llama() | scaled((12, 8)) | {"lm_head.weight": np.ones((16, 8), ml_dtypes.float8_e5m2)}, FP8),
    ],
)
def test_what_is_not_understood_stays_as_it_is(tmp_path: Path, tensors: dict[str, Array], setting: Any) -> None:
    """So that the planner refuses it."""
    source = opened(tmp_path / "m", tensors, setting)
    assert not isinstance(source, ScaledCheckpoint)
    assert set(source.tensors) == set(tensors)


def test_a_model_without_a_config(tmp_path: Path) -> None:
    folder = factory.model(tmp_path / "m", llama() | scaled((12, 8)), None)
    assert not isinstance(read_as_weights(open_folder(folder, name="m")), ScaledCheckpoint)
