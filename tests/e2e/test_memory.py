"""The resident peak of a merge stays under what its plan predicts, and does not grow with the tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smelt.dtypes import BF16
from smelt.storage.layout import OutputTensor
from smelt.storage.writer import Build, layout

RECIPES = {
    "linear": "merge_method: linear\nmodels: [{model: m0}, {model: m1}, {model: m2}]\nparameters: {weight: 1}\n",
    "ties": "merge_method: ties\nbase_model: m0\nmodels: [{model: m1}, {model: m2}]\n"
    "parameters: {weight: 1, density: 0.5}\n",
    "nested": "merge_method: ties\nbase_model: m0\nmodels: [{model: s}, {model: m2}]\n"
    "parameters: {weight: 1, density: 0.5}\nmerges:\n  s: {merge_method: linear, models: [{model: r}, {model: m1}], "
    "parameters: {weight: 1}}\n"
    "  r: {merge_method: slerp, base_model: m0, models: [{model: m1}], parameters: {t: 0.5}}\n",
    "slerp": "merge_method: slerp\nbase_model: m0\nmodels: [{model: m1}]\nparameters: {t: 0.5}\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of 100 MB in two tensors: more than a merge may hold."""
    folder = tmp_path_factory.mktemp("models")
    plan = layout([OutputTensor(f"w{i}", BF16, (5000, 5000)) for i in range(2)], shard_bytes=1 << 40)
    rng = np.random.default_rng(0)
    for number in range(3):
        with Build.start(folder / f"m{number}", plan, overwrite=False) as build:
            for name in ("w0", "w1"):
                codes = (0x3C00 + rng.integers(0, 512, 25_000_000, dtype=np.uint16)).view(np.uint8)
                build.write(name, 0, codes)
            build.put("config.json", b"{}")
            build.commit()
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident peak is read from /proc")
@pytest.mark.parametrize("name", RECIPES)
def test_the_peak_is_below_the_plan(name: str, models: Path, tmp_path: Path) -> None:
    (models / f"{name}.yml").write_text(RECIPES[name], encoding="utf-8")
    words = [sys.executable, "-m", "smelt", "plan", f"{name}.yml", "--json"]
    planned = json.loads(subprocess.run(words, cwd=models, capture_output=True, check=True).stdout)
    # Asked of the process itself: what the system tells of a child counts the memory of who started it.
    code = f"""
import re, sys
from smelt.cli.main import run
code = run(["merge", "{name}.yml", {str(tmp_path / "out")!r}, "--quiet"])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=models, capture_output=True, text=True, check=True)
    peak = 1024 * int(done.stdout)
    assert peak <= planned["forecast"]["memory"]
    assert peak <= 500e6
