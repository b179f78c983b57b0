"""Stopping a merge while it works: nothing is left, what was there stays, and the next run is none the wiser."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import factory
from factory import command, config, recipe, smelt, snapshot

SIZE = 24 << 20
"""Bytes of each model: seconds of work on one thread for `pcb` by rows, which has no loops."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders m0, m1, m2, the last two sharing one large weight file, and a recipe over them."""
    folder = tmp_path_factory.mktemp("large")
    rows = SIZE // 6 // 4 // 1024
    layers = 6
    noise = np.random.default_rng(0).standard_normal((rows, 1024), dtype=np.float32)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": noise for i in range(layers)}
    factory.model(folder / "m0", tensors, config(layers=layers))
    factory.model(folder / "m1", {name: values[::-1] for name, values in tensors.items()}, config(layers=layers))
    (folder / "m2").mkdir()
    for file in ("model.safetensors", "config.json"):
        os.link(folder / "m1" / file, folder / "m2" / file)
    settings = {"density": 0.5, "granularity": "row"}
    tree = factory.linear("m1", "m2", merge_method="pcb", base_model="m0", parameters=settings)
    recipe(folder / "recipe.yml", tree)
    return folder


@pytest.fixture
def place(models: Path) -> Iterator[Path]:
    """An empty folder for outputs, on the same file system."""
    folder = models / "place"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", folder], check=True)


def start(models: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """Begin a merge, and return when it is at work on the weights."""
    running = subprocess.Popen(
        command("merge", models / "recipe.yml", out, "--threads", 1, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    build = out.parent / f".{out.name}.smelt-build"
    deadline = time.monotonic() + 60
    while not (build / "model.safetensors").exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.05)
    assert running.poll() is None, "the models are too small to interrupt their merge"
    assert build.exists()
    return running


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted: nothing was left behind"),
        (signal.SIGTERM, 143, "terminated: nothing was left behind"),
        (signal.SIGHUP, 129, "terminated: nothing was left behind"),
    ],
)
def test_a_signal_leaves_nothing(models: Path, place: Path, number: int, code: int, said: str) -> None:
    running = start(models, place / "new" / "out")
    assert (place / "new" / ".out.smelt-build.lock").exists()
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == code, err
    assert out == ""
    later = err.splitlines()[2:]  # than the two lines of the plan
    assert [line for line in later if "compiling its loops" not in line] == [said]
    assert snapshot(place) == {}


def test_json_leaves_the_streams_clean(models: Path, place: Path) -> None:
    running = start(models, place / "out", "--json")
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err) == (130, "", "interrupted: nothing was left behind\n")


@pytest.mark.parametrize("pause", [0.0, 0.002, 0.02])
def test_impatience_leaves_nothing_either(models: Path, place: Path, pause: float) -> None:
    """Ctrl-C twice and more: the cleaning up that the first one began goes on to its end."""
    running = start(models, place / "out")
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        if running.poll() is None:
            running.send_signal(number)
        time.sleep(pause)
    _, err = running.communicate(timeout=60)
    assert running.returncode in (130, 143), err  # which of several signals is handled first is not ours to say
    assert "Traceback" not in err, err
    assert err.count("nothing was left behind") == 1
    assert snapshot(place) == {}


def test_an_output_that_is_there_stays_as_it_was(models: Path, place: Path) -> None:
    small = factory.llamas(place / "small", 2)
    out = place / "out"
    assert smelt("merge", recipe(place / "recipe.yml", factory.linear(*small)), out).code == 0
    (out / "mine.txt").write_text("mine")
    before = snapshot(place)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        running = start(models, out, "--overwrite")
        running.send_signal(number)
        running.communicate(timeout=60)
        assert running.returncode == code
        assert snapshot(place) == before


def test_early_signals(models: Path, place: Path) -> None:
    """While it still starts, reads and plans."""
    for pause in (0.25, 0.35, 0.45):
        words = command("merge", models / "recipe.yml", place / "out", "--threads", 1)
        running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(pause)
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
        assert running.returncode in (143, -signal.SIGTERM), err  # the latter before smelt is loaded
        assert snapshot(place) == {}


def test_a_second_run_on_the_same_output_is_refused(models: Path, place: Path) -> None:
    running = start(models, place / "out")
    done = smelt("merge", models / "recipe.yml", place / "out", "--overwrite")
    assert done.code == 4
    assert "another smelt run is writing here" in done.err
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert snapshot(place) == {}


def test_after_a_kill_the_next_run_cleans_up(models: Path, place: Path) -> None:
    running = start(models, place / "out")
    running.kill()
    running.communicate(timeout=60)
    assert not (place / "out").exists()
    left = place / ".out.smelt-build" / "model.safetensors"
    assert left.read_bytes()[:8] == bytes(8)  # no program takes it for a checkpoint
    small = factory.llamas(models / "place" / "small", 2)
    done = smelt("merge", recipe(place / "recipe.yml", factory.linear(*small)), place / "out")
    assert done.code == 0, done.text
    assert {path.name for path in place.iterdir()} == {"out", "small", "recipe.yml"}
    assert smelt("verify", place / "out").code == 0


def test_signals_that_the_shell_ignores_stay_ignored(models: Path, place: Path) -> None:
    """As under nohup: the end of the terminal does not end the merge."""
    small = factory.llamas(place / "small", 2)
    path = recipe(place / "recipe.yml", factory.linear(*small))
    words = command("merge", path, place / "out", "-q")
    running = subprocess.Popen(
        ["/bin/sh", "-c", 'trap "" HUP INT; echo ready >&2; exec "$@"', "sh", *words], stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None
    assert running.stderr.readline() == "ready\n"
    for _ in range(50):
        if running.poll() is None:
            running.send_signal(signal.SIGHUP)
            running.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
