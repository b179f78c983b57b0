"""What linear algebra costs, as `smelt plan` says it, and the memory that it is said to need."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

import factory

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
RECIPE = """\
merge_method: {method}
base_model: models/llama-base
models: [{{model: models/llama-ft1}}, {{model: models/llama-ft2}}]
parameters: {{{parameters}}}
"""


def planned(tmp_path: Path, *arguments: str, method: str = "tsv", parameters: str = "lambda: 1") -> factory.Done:
    recipe = tmp_path / "r.yml"
    recipe.write_text(RECIPE.format(method=method, parameters=parameters))
    with contextlib.chdir(GOLDEN):
        done = factory.smelt("plan", recipe, *arguments)
    assert done.code == 0, done.text
    return done


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv", "wudi"])
def test_each_matrix_says_what_it_costs(tmp_path: Path, method: str) -> None:
    lines = planned(tmp_path, "--threads", "2", method=method).out.splitlines()
    matrix = next(line for line in lines if "up_proj" in line)
    assert re.search(r"1 pass, [\d.]+ MFLOP, [\d.e-]+ s, [\d.]+ kB  ", matrix), matrix
    norm = next(line for line in lines if "input_layernorm" in line)
    assert re.search(r"1 pass  ", norm), norm
    assert re.search(
        r"^linear algebra: [\d.]+ [MG]FLOP, about [\d.e-]+ s with 2 threads at 20 GFLOP a second each$",
        "\n".join(lines),
        re.MULTILINE,
    )


def test_for_programs(tmp_path: Path) -> None:
    tree = planned(tmp_path, "--json", "--threads", "1").json
    work = {row["name"]: row["work"] for row in tree["tensors"] if "work" in row}
    assert "model.norm.weight" not in work
    total = sum(cost["flops"] for cost in work.values())
    assert tree["forecast"]["work_seconds"] == pytest.approx(total / 2e10)
    assert all(cost["seconds"] == cost["flops"] / 2e10 and cost["bytes"] > 0 for cost in work.values())
    two = planned(tmp_path, "--json", "--threads", "2").json["forecast"]
    assert two["work_seconds"] == pytest.approx(total / 4e10)
    assert two["memory"] > tree["forecast"]["memory"]


def test_other_methods_say_nothing(tmp_path: Path) -> None:
    done = planned(tmp_path, method="task_arithmetic", parameters="weight: 1")
    assert "FLOP" not in done.out
    tree = planned(tmp_path, "--json", method="task_arithmetic", parameters="weight: 1").json
    assert not any("work" in row for row in tree["tensors"])
    assert tree["forecast"]["work_seconds"] == 0.0
