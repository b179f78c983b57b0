"""`--device` from the command line to the record: the same output, the record of it, and mistakes that cost nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import smelt as library
from factory import GOLDEN, smelt, stored
from smelt.engine import backends
from smelt.engine.backends import check_name, choose, default_tile, default_workers
from smelt.errors import RecipeError, SmeltError
from smelt.lineage.verify import verify

CASES = [
    "ties-density-gradient",
    "slerp-gradient-filters",
    "bf16-ties",
    "passthrough-stack",
    "slices-mixed-methods",
]
"""Gradients over layers, filters, bfloat16, copied tensors, methods that differ by layer."""


@pytest.fixture(autouse=True)
def in_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)


def merged(case: str, out: Path, *words: object) -> Path:
    done = smelt("merge", f"cases/{case}/recipe.yml", out, *words)
    assert done.code == 0, done.text
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_whole_merge(case: str, tmp_path: Path) -> None:
    here = merged(case, tmp_path / "cpu", "-q")
    there = merged(case, tmp_path / "device", "-q", "--device", "torch:cpu")
    assert verify(there).problems == ()
    ours, theirs = stored(here), stored(there)
    assert list(ours) == list(theirs)
    for name, want in ours.items():
        assert want.dtype == theirs[name].dtype
        distance = np.abs(want.astype(np.float64) - theirs[name].astype(np.float64))
        spacing = np.spacing(np.abs(want)) if want.dtype != "bfloat16" else 2.0**-7 * np.abs(want.astype(np.float64))
        assert (distance <= spacing.astype(np.float64)).all(), name
    files = [{path.name for path in folder.iterdir()} for folder in (here, there)]
    assert files[0] == files[1]


def test_the_record_says_where(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    for name, words in (("cpu", ()), ("device", ("--device", "torch:cpu"))):
        out = merged("ties", tmp_path / name, "-q", *words)
        records.append(json.loads((out / "smelt.json").read_text(encoding="utf-8")))
    assert "device" not in records[0]
    assert records[1]["device"] == {"name": "torch:cpu", "hardware": "CPU", "torch": torch.__version__}
    (note,) = set(records[1]["notes"]) - set(records[0]["notes"])
    assert note.startswith("worked out on the device torch:cpu")
    assert "last place" in note
    assert records[0]["tensors"].keys() == records[1]["tensors"].keys()
    found = library.verify(tmp_path / "device")
    assert not found.problems
    assert any("worked out on a device" in note for note in found.notes)


def test_what_is_said_of_the_memory(tmp_path: Path) -> None:
    """The plan does not need the device."""
    done = smelt("plan", "cases/ties/recipe.yml", "--device", "cuda:7", "--threads", 2)
    assert done.code == 0
    assert "with 2 threads, and about " in done.out
    assert " on cuda:7 for each thread" in done.out
    assert "note: worked out on the device cuda:7" in done.out
    forecast = json.loads(smelt("plan", "cases/ties/recipe.yml", "--device", "cuda", "--json").out)["forecast"]
    assert forecast["device"] == "cuda"
    assert forecast["device_memory"] > 10_000
    assert forecast["memory"] > 1 << 30
    plain = smelt("plan", "cases/ties/recipe.yml")
    assert "for each thread" not in plain.out
    assert "device" not in json.loads(smelt("plan", "cases/ties/recipe.yml", "--json").out)["forecast"]
    said = smelt("merge", "cases/ties/recipe.yml", tmp_path / "out", "--device", "torch:cpu")
    assert " on torch:cpu for each thread" in said.err


def test_the_forecast_grows_with_the_tensors(tmp_path: Path) -> None:
    from smelt.preparing import prepare

    with prepare("cases/ties/recipe.yml", device="cuda") as large:
        pass
    with prepare("cases/slerp/recipe.yml", device="cuda", workers=1) as small:
        pass
    assert large.forecast.device_memory > small.forecast.device_memory > 0
    assert large.forecast.workers >= 2
    assert large.forecast.memory > small.forecast.memory


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "torch", "torch:meta", "mps", "CUDA", "", "cpu:0"])
def test_an_unknown_name(word: str, tmp_path: Path) -> None:
    for command in (("merge", "cases/ties/recipe.yml", tmp_path / "out"), ("plan", "cases/ties/recipe.yml")):
        done = smelt(*command, "--device", word)
        assert done.code == 2
        assert "there is no device called" in done.err
        assert "fix: known are cpu (the default), cuda" in done.err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match="there is no device called"):
        check_name(word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("word", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there(word: str, tmp_path: Path) -> None:
    done = smelt("merge", "cases/ties/recipe.yml", tmp_path / "out", "--device", word)
    assert done.code == 2
    assert f"there is no device {word}" in done.err
    assert f"torch {torch.__version__} finds no CUDA device" in done.err
    assert "merge on the CPU (leave the device out)" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_device_beyond_those_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    with pytest.raises(RecipeError, match="there is no device cuda:2") as caught:
        choose("cuda:2")
    assert caught.value.where == ("cuda:0  GPU 0", "cuda:1  GPU 1")
    assert caught.value.fix == "choose one of these"
    assert choose("cuda:1").described() == {
        "name": "cuda:1",
        "hardware": "GPU cuda:1",
        "torch": torch.__version__,
    }


def test_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="the device cuda needs torch, which is not installed") as caught:
        library.merge("cases/ties/recipe.yml", tmp_path / "out", device="cuda")
    assert "pip install torch" in (caught.value.fix or "")
    assert list(tmp_path.iterdir()) == []
    assert choose("cpu").described() is None


def test_a_device_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own errors are told as such, and nothing is left."""
    from smelt.engine.backends import torch_tiles

    class AcceleratorError(RuntimeError):
        pass

    def broken(self: Any, raw: Any, dtype: Any) -> Any:
        raise AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch_tiles.TorchBackend, "decoded", broken)
    with pytest.raises(
        SmeltError, match="the device torch:cpu failed: CUDA error: unspecified launch failure"
    ) as caught:
        library.merge("cases/ties/recipe.yml", tmp_path / "out", device="torch:cpu")
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_torch_is_not_loaded_for_the_cpu(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, smelt; from smelt.engine import backends; smelt.merge('cases/linear/recipe.yml',"
        f" {str(tmp_path / 'out')!r}, device='cpu'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dicts(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    base, *models = ({"w": torch.randn(64, 33, generator=rng).to(dtype)} for _ in range(3))
    settings: dict[str, Any] = {"method": "dare_ties", "base": base, "weight": [0.5, 0.7], "density": 0.5, "seed": 3}
    here = library.merge_state_dicts(models, **settings)
    there = library.merge_state_dicts(models, **settings, device="torch:cpu")
    assert there["w"].device.type == "cpu"
    assert torch.equal(here["w"], there["w"])
    with pytest.raises(RecipeError, match="there is no device called 'tpu'"):
        library.merge_state_dicts(models, **settings, device="tpu")


def test_defaults() -> None:
    assert 2 <= default_workers("cuda") <= 4
    assert default_workers() >= 1
    assert default_tile("cuda") > default_tile()
