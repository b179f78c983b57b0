"""`make kills`: SIGKILL at every file operation of a merge, and at random times; every time it is resumed.

After each kill OUT is absent, the old one or the new one, whole; and `--resume` ends with the files of a run that
was not interrupted, byte for byte, and nothing beside them. Not part of `make test`: some minutes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import factory
import faulty
from factory import linear, recipe, snapshot

SECOND = 3
"""Every so many points, the run that resumes is killed as well, at a random operation."""
RANDOM = 40
"""Kills at random times, of a larger merge in a process of its own."""
LARGE = 24 << 20
"""Bytes of each model of that merge."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tree(*models: Path) -> dict[str, object]:
    """Every kind of pass: `ties` sorts, and most of its tensors are gone through more than once."""
    return linear(*models[1:], merge_method="ties", base_model=str(models[0]), parameters={"weight": 1, "density": 0.5})


def check_state(place: Path, new: dict[str, str], old: dict[str, str]) -> str:
    """What a user finds at OUT, which must be whole: "new", "old", "aside" (between two renames), or "nothing"."""
    out = place / "out"
    if not out.exists():
        aside = place / ".out.smelt-old"
        if aside.exists():
            assert snapshot(aside) == old
            return "aside"
        return "nothing"
    found = snapshot(out)
    if found == new:
        return "new"
    assert found == old
    return "old"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def test_a_kill_at_every_file_operation(tmp_path: Path, overwrite: bool, after: bool) -> None:
    models = factory.llamas(tmp_path, 3)
    path = recipe(tmp_path / "recipe.yml", tree(*models))
    other = recipe(tmp_path / "other.yml", linear(*models))
    words = ["merge", path, "--shard-size", "1kB", "--threads", 2]
    (tmp_path / "whole").mkdir()
    for source, out in ((path, tmp_path / "whole" / "out"), (other, tmp_path / "old")):
        assert factory.smelt("merge", source, out, *words[2:]).code == 0
    new, old = snapshot(tmp_path / "whole" / "out"), snapshot(tmp_path / "old")
    chance = random.Random(0)
    points = 0
    seen: Counter[str] = Counter()
    place = tmp_path / "place"
    while True:
        place.mkdir()
        if overwrite:
            shutil.copytree(tmp_path / "old", place / "out")
        run = [*words[:2], place / "out", *words[2:], *(["--overwrite"] if overwrite else [])]
        ended = faulty.forked(run, tmp_path, at=points, after=after)
        if ended.code == 0:
            assert points >= ended.calls
            break
        assert ended.code == -signal.SIGKILL, ended.err
        state = check_state(place, new, old)
        seen[state] += 1
        if points % SECOND == 0 and (overwrite or state != "new"):
            again = faulty.forked([*run, "--resume"], tmp_path, at=chance.randrange(ended.calls or 150), after=after)
            assert again.code in (0, -signal.SIGKILL), again.err
            seen["killed twice"] += again.code != 0
            state = check_state(place, new, old)
        if state != "new" or overwrite:
            resumed = faulty.forked([*run, "--resume", "--json"], tmp_path)
            assert resumed.code == 0, resumed.err + resumed.out
            seen["tensors resumed"] += json.loads(resumed.out)["resumed"]
            seen["runs that resumed some"] += json.loads(resumed.out)["resumed"] > 0
        else:
            assert faulty.forked(["clean", place], tmp_path).code == 0
        assert snapshot(place) == {"out": "folder", **{f"out/{name}": what for name, what in new.items()}}
        shutil.rmtree(place)
        points += 1
    print(f"\n{points} points, {dict(seen)}")
    assert points > 100
    assert seen["runs that resumed some"] > 20


def test_kills_at_random_times(tmp_path: Path) -> None:
    rows = LARGE // 12 // 4 // 512
    models = []
    for number in range(3):
        noise = np.random.default_rng(number)
        tensors = {
            f"model.layers.{i}.mlp.up_proj.weight": noise.standard_normal((rows, 512), dtype=np.float32)
            for i in range(12)
        }
        models.append(factory.model(tmp_path / f"m{number}", tensors, factory.config(layers=12)))
    settings = {"density": 0.5, "granularity": "row"}
    slow = linear(*models[1:], merge_method="pcb", base_model=str(models[0]), parameters=settings)
    path = recipe(tmp_path / "recipe.yml", slow)
    (tmp_path / "whole").mkdir()
    started = time.monotonic()
    done = factory.process("merge", path, tmp_path / "whole" / "out", "--shard-size", "5MB")
    assert done.code == 0, done.text
    seconds = time.monotonic() - started
    new = snapshot(tmp_path / "whole" / "out")
    chance = random.Random(1)
    seen: Counter[str] = Counter()
    environment = {**os.environ, "SMELT_TEST_SYNC_BYTES": str(1 << 20)}
    place = tmp_path / "place"
    for _ in range(RANDOM):
        place.mkdir()
        words = [sys.executable, faulty.__file__, "merge", path, place / "out", "--shard-size", "5MB"]
        running = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None:  # killed again and again, each time resumed, until it gets to its end
            time.sleep(chance.uniform(0.3, 1.1) * seconds)
            running.kill()
            running.wait()
            state = check_state(place, new, {})
            seen[state] += 1
            if state == "new":
                break
            left = place / ".out.smelt-build.journal"
            seen["with a journal"] += left.exists()
            words += ["--resume"] * ("--resume" not in words)
            resumed = subprocess.run([*words, "--json"], env=environment, capture_output=True, check=False)
            assert resumed.returncode == 0, resumed.stderr
            seen["tensors resumed"] += json.loads(resumed.stdout)["resumed"]
        assert snapshot(place / "out") == new
        shutil.rmtree(place)
    print(f"\n{RANDOM} random kills in {seconds:.1f} s merges, {dict(seen)}")
    assert seen["tensors resumed"] > 0
