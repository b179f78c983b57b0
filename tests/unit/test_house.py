"""The house: imports run one way, modules stay small, and nothing heavy is on the path of a merge."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import smelt

ROOT = Path(smelt.__file__).parent
ORDER = [
    {"errors", "dtypes", "specs", "_version"},
    {"storage", "methods"},
    {"recipe"},
    {"tokens"},
    {"planning"},
    {"engine", "lineage"},
    {"keeping"},
    {"prepared"},
    {"guarding"},
    {"preparing"},
    {"writing"},
    {"merging", "in_memory", "verifying"},
    {"candidates", "listing", "scoring"},
    {"sweeping", "trying"},
    {"cli"},
]
"""A room imports itself and rooms further up; rooms of one line do not import each other (errors, dtypes, specs do)."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MODULES = sorted(
    path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem not in {"__init__", "__main__"}
)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "smelt"]
        found |= {name.split(".")[1] for name in names if name.startswith("smelt.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    here = room(path)
    for other in imported(path):
        allowed = other == here or LEVEL[other] < LEVEL[here] or (LEVEL[other] == LEVEL[here] == 0)
        assert allowed, f"{path.relative_to(ROOT)} imports smelt.{other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_smelt_loads_nothing() -> None:
    heavy = {"numpy", "numba", "pydantic", "torch", "transformers", "huggingface_hub", "ruamel", "rich", "cyclopts"}
    assert not loaded("import smelt") & heavy


def test_a_merge_loads_neither_torch_nor_a_model_library(tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "golden" / "data"
    merge = f"smelt.merge('cases/linear/recipe.yml', {str(tmp_path / 'o')!r})"
    code = f"import os, smelt; os.chdir({str(data)!r}); {merge}"
    found = loaded(code)
    assert "numpy" in found
    assert not found & {"torch", "transformers", "safetensors", "huggingface_hub", "tokenizers", "requests", "httpx"}


def test_the_core_asks_for_no_model_library() -> None:
    with open(ROOT.parents[1] / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    assert "numpy" in names
    assert not names & {"torch", "transformers", "safetensors", "tokenizers", "peft", "accelerate"}


def test_public_names_are_what_they_say() -> None:
    from smelt import merge, merge_state_dicts, plan

    assert callable(merge)
    assert callable(plan)
    assert callable(merge_state_dicts)
    for name in smelt.__all__:
        assert getattr(smelt, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = smelt.nonsense
