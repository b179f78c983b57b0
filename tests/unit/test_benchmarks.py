"""The programs of benchmarks/ run at their least size and remove what they made; no number is judged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ZOO = BENCHMARKS.parent / "examples" / "zoo"


def command(program: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(BENCHMARKS / program), *(str(argument) for argument in arguments)]


def ran(program: str, *arguments: str | Path) -> list[str]:
    """The lines that a program printed."""
    done = subprocess.run(command(program, *arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def rows(lines: list[str]) -> list[list[str]]:
    """The cells of all table lines."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_merge(tmp_path: Path) -> None:
    options = ("--size", "tiny", "--rounds", "1", "--no-peer", "--only", "ties,small", "--folder", tmp_path)
    head, _, ties, small = rows(ran("merge.py", *options))
    assert (ties[0], small[0]) == ("ties", "small")
    assert len(head) == len(ties) == len(small)
    assert float(ties[head.index("process s")]) > float(ties[head.index("engine s")]) > 0
    assert list(tmp_path.iterdir()) == []


def test_merge_on_disk_has_a_line_for_fsync(tmp_path: Path) -> None:
    options = ("--size", "tiny", "--rounds", "1", "--no-peer", "--only", "slerp", "--disk", tmp_path)
    head, _, slerp, sync = rows(ran("merge.py", *options))
    assert (slerp[0], sync[0]) == ("slerp", "slerp, fsync")
    assert len(head) == len(slerp) == len(sync)
    assert list(tmp_path.iterdir()) == []


def test_cold_needs_a_disk(tmp_path: Path) -> None:
    done = subprocess.run(command("merge.py", "--cold", "--folder", tmp_path), capture_output=True, text=True)
    assert done.returncode == 2
    assert "--cold needs --disk" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_anything_is_made(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from measure import workplace
with workplace(Path(sys.argv[1]), needed=1 << 60):
    print("made")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 1
    assert "free, and this needs" in done.stderr
    assert not done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    options = ("--size", "tiny", "--rounds", "1000", "--no-peer", "--only", "linear", "--folder", tmp_path)
    process = subprocess.Popen(command("merge.py", *options), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("|---"):  # the models are made; while one is committed, signals wait
        assert process.poll() is None
    os.kill(process.pid, number)
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_startup(tmp_path: Path) -> None:
    lines = rows(ran("startup.py", "--size", "tiny", "--rounds", "1", "--folder", tmp_path))
    assert [line[0] for line in lines if line[0] in {"linear", "slerp", "ties"}] == ["linear", "slerp", "ties"]
    assert sum(line[0].startswith("smelt plan") for line in lines) == 3
    assert list(tmp_path.iterdir()) == []


def test_sweep_and_figures(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    ran("sweep.py", "--size", "tiny", "--rounds", "1", "--folder", work, "--out", out, "--no-figures")
    assert list(work.iterdir()) == []
    curves = json.loads((out / "curves.json").read_text(encoding="utf-8"))
    assert {point["x"] for point in curves["models"]} == set(range(2, 9))
    assert len({point["bytes"] for point in curves["bytes"] if point["method"] == "slerp"}) == 4
    assert set(curves["fits"]) == {"slerp", "ties"}
    assert (out / "curves.md").read_text(encoding="utf-8").startswith("# How the time grows")
    pytest.importorskip("matplotlib")
    drawn = ran("figures.py", out)
    assert [Path(path).name for path in drawn] == ["bytes.png", "models.png", "tiles.png", "threads.png"]
    assert all(Path(path).stat().st_size > 5000 for path in drawn)


def test_trust(tmp_path: Path) -> None:
    _, _, *found = rows(ran("trust.py", "--size", "tiny", "--rounds", "1", "--folder", tmp_path))
    assert "smelt verify" in [row[0] for row in found]
    assert all(float(row[1]) >= 0 for row in found)
    assert list(tmp_path.iterdir()) == []


def test_candidates(tmp_path: Path) -> None:
    options = ("--size", "tiny", "--count", "3", "--rounds", "1", "--only", "over lambda", "--folder", tmp_path)
    head, _, *found = rows(ran("candidates.py", *options))
    assert [row[0] for row in found] == [f"{name} over lambda" for name in ("task_arithmetic", "ties", "dare_ties")]
    for row in found:
        assert len(row) == len(head)
        assert float(row[head.index("s a merge")]) > 0
    assert list(tmp_path.iterdir()) == []


def zoo(folder: Path, *arguments: str) -> list[str]:
    """The zoo study at its least size, on the models of examples/."""
    options = ("--only", "linear,dare_ties", "--windows", "9", "--problems", "14", "--no-figures")
    places = ("--zoo", ZOO, "--state", folder / "state.jsonl", "--out", folder, "--page", folder / "page.md")
    return ran("zoo/run.py", *places, *options, *arguments)


def test_zoo(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables: legal-math -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    lines = zoo(tmp_path)
    assert any(line.startswith("left out: legal + minus") for line in lines)
    results = json.loads((tmp_path / "zoo.json").read_text(encoding="utf-8"))
    assert list(results["groups"]) == ["legal + math"]
    group = results["groups"]["legal + math"]
    single = {row["model"]: row["shares"] for row in group["single"]}
    assert (single["base"]["legal"], single["legal"]["legal"], single["math"]["math"]) == (0, 1, 1)
    found = {row["method"]: row for row in group["rows"]}
    assert 0 < found["linear"]["shares"]["legal"] < 1  # between the base and the expert, whatever the setting
    assert found["linear"]["spread"] is None
    assert found["dare_ties"]["spread"] is not None  # three seeds, of which each drops other entries
    assert found["dare_ties"]["default_setting"] == "defaults"  # which drop nothing, so that they are not chosen
    assert [x for x, _ in group["curves"]["linear"]["points"]] == [0.2, 0.35, 0.5, 0.65, 0.8]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert {"linear", "dare_ties", "*legal*"} <= {row[0] for row in rows(text.splitlines())}


def test_zoo_goes_on_and_refuses_results_of_other_data(tmp_path: Path) -> None:
    (tmp_path / "page.md").touch()
    zoo(tmp_path)
    state, whole = tmp_path / "state.jsonl", (tmp_path / "state.jsonl").read_text(encoding="utf-8").splitlines()
    first = (tmp_path / "zoo.json").read_text(encoding="utf-8")
    state.write_text("\n".join(whole[:-4]) + "\n", encoding="utf-8")
    zoo(tmp_path)
    assert [_without_time(line) for line in state.read_text(encoding="utf-8").splitlines()] == [
        _without_time(line) for line in whole
    ]
    again = json.loads((tmp_path / "zoo.json").read_text(encoding="utf-8"))["groups"]["legal + math"]["rows"]
    before = json.loads(first)["groups"]["legal + math"]["rows"]
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in before]
    other = command("zoo/run.py", "--zoo", ZOO, "--state", state, "--out", tmp_path, "--windows", "12", "--no-figures")
    done = subprocess.run(other, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "results of other models or data" in done.stderr


def _without_time(line: str) -> dict[str, object]:
    return json.loads(line) | {"seconds": None}


def test_zoo_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "page.md").touch()
    zoo(tmp_path)
    drawn = ran("zoo/figures.py", tmp_path)
    assert [Path(path).name for path in drawn] == ["zoo.png", "zoo-strength.png", "zoo-cost.png"]
    assert all(Path(path).stat().st_size > 5000 for path in drawn)
