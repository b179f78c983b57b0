"""docs/writing-a-method.md, followed to the letter: its files work, its test passes, its package brings the method.

That its commands print what the page shows is tested with the other documents (tests/unit/test_docs.py).
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import factory
import smelt
from smelt.methods import api

PAGE = (Path(__file__).parents[2] / "docs" / "writing-a-method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+).*?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NAMED = {found[1]: text for _, text in BLOCKS if (found := re.match(r"# ([\w.-]+\.(?:py|yml))\n", text)) is not None}


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The methods that are registered here are gone afterwards."""
    api.names()
    before = dict(api._REGISTRY)
    yield
    api._REGISTRY.clear()
    api._REGISTRY.update(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the page: its files and recipes, and the models."""
    (tmp_path / "models").symlink_to(factory.GOLDEN / "models")
    for name, text in NAMED.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder: Path, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path or folder)}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_every_python_block_is_a_file() -> None:
    python = [text for language, text in BLOCKS if language == "python"]
    assert len(python) == sum(name.endswith(".py") for name in NAMED) >= 5
    recipes = [text for language, text in BLOCKS if language == "yaml"]
    assert len(recipes) == sum(name.endswith(".yml") for name in NAMED) >= 4


def test_the_smallest_method(folder: Path) -> None:
    smelt.merge("mean.yml", "out", trust_methods=True)
    base, one, two = (factory.stored(folder / "models" / name) for name in ("llama-base", "llama-ft1", "llama-ft2"))
    for name, value in factory.stored(folder / "out").items():
        assert np.allclose(value, (one[name].astype(np.float64) + two[name]) / 2, atol=1e-7), name
        assert value.shape == base[name].shape


def test_the_trimmed_mean_on_checkpoints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings of the recipe: a gradient on the MLPs, bfloat16 out."""
    smelt.merge("trimmed.yml", "out", trust_methods=True)
    monkeypatch.setitem(sys.modules, "trimmed_mean", ModuleType("trimmed_mean"))  # which the test file imports
    reference: Callable[..., Any] = runpy.run_path("test_trimmed_mean.py")["reference"]
    base, *models = (
        factory.stored(folder / "models" / name) for name in ("llama-base", "llama-ft1", "llama-ft2", "llama-ft3")
    )
    for name, value in factory.stored(folder / "out").items():
        layer = re.search(r"layers\.(\d)\.mlp", name)
        factor = 0.5 + 0.5 * int(layer[1]) / 3 if layer else 1.0
        wanted = reference(base[name], [model[name] for model in models], factor=factor)
        assert value.dtype == ml_dtypes.bfloat16
        assert np.allclose(value.astype(np.float64), wanted, rtol=2**-8, atol=1e-7), name


def test_its_own_test_passes(folder: Path) -> None:
    done = run(folder, "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "test_trimmed_mean.py")
    assert done.returncode == 0, done.stdout
    tests = len(re.findall(r"^def test_", NAMED["test_trimmed_mean.py"], re.MULTILINE))
    assert re.search(r"(\d+) passed", done.stdout)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= tests  # type: ignore[index]


def test_its_test_finds_a_mistake(folder: Path) -> None:
    """The page says that the test of tiles finds what depends on the cut: it does."""
    path = folder / "trimmed_mean.py"
    text = path.read_text()
    wrong = text.replace("return xp.astype(base + self", "return xp.astype(base + 1e-3 * xp.mean(deltas) + self")
    assert wrong != text
    path.write_text(wrong)
    done = run(folder, "pytest", "-q", "-p", "no:cacheprovider", "test_trimmed_mean.py", "-k", "how_it_is_cut")
    assert done.returncode == 1
    assert "1 failed" in done.stdout


def test_the_package(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What an installer makes of the page's pyproject.toml: the module, and its entry points in a dist-info folder."""
    (project,) = (tomllib.loads(text) for language, text in BLOCKS if language == "toml")
    site = tmp_path_factory.mktemp("site")
    for name in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        (site / name).write_text(NAMED[name], encoding="utf-8")
    name, version = project["project"]["name"], project["project"]["version"]
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = project["project"]["entry-points"]["smelt.methods"]
    lines = "".join(f"{point} = {value}\n" for point, value in points.items())
    (info / "entry_points.txt").write_text(f"[smelt.methods]\n{lines}")

    text = NAMED["trimmed.yml"].replace("methods: [./trimmed_mean.py]\n", "")
    assert text != NAMED["trimmed.yml"]
    (folder / "plain.yml").write_text(text)
    (folder / "trimmed_mean.py").unlink()
    merged = run(folder, "smelt", "merge", "plain.yml", "out", path=site)
    assert merged.returncode == 0, merged.stderr
    shown = run(folder, "smelt", "methods", "trimmed_mean", path=site)
    assert "Leave out the largest and the smallest changes of each entry" in shown.stdout
    assert re.search(r"trim +int in \[0, inf\) +1 +how many values of each entry", shown.stdout)


def test_the_example_in_the_docstring_is_a_recipe(folder: Path) -> None:
    from ruamel.yaml import YAML

    example = re.search(r"Example:\n(.*?)    \"\"\"", NAMED["trimmed_mean.py"], re.DOTALL)
    assert example is not None
    tree = YAML(typ="safe").load(example[1])
    smelt.merge({**tree, "methods": ["./trimmed_mean.py"]}, "out", trust_methods=True)


def test_rows(folder: Path) -> None:
    recipe = {"merge_method": "centred", "methods": ["./centred.py"], "models": [{"model": "models/llama-ft1"}]}
    smelt.merge(recipe, "one", trust_methods=True, workers=1, tile=65536)
    smelt.merge(recipe, "two", trust_methods=True, workers=3, tile=1 << 20)
    for name, value in factory.stored(folder / "one").items():
        model = factory.stored(folder / "models" / "llama-ft1")[name].astype(np.float64)
        assert np.allclose(value, model - model.mean(axis=-1, keepdims=True), atol=1e-7)
    assert (folder / "one" / "model.safetensors").read_bytes() == (folder / "two" / "model.safetensors").read_bytes()


def test_the_table_of_arguments_is_complete() -> None:
    """Every argument that the engine gives has its row."""
    rows = re.findall(r"^\| `(\w+)` \|", PAGE[PAGE.index("### What a function is given") :], re.MULTILINE)
    assert set(rows) >= api._GIVEN
    assert {f"`{grain.name}`" for grain in api.Grain} <= set(re.findall(r"^\| (`[A-Z]+`)", PAGE, re.MULTILINE))
