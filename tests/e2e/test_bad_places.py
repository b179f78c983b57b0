"""Places that cannot be written, files that cannot be read, limits of the system: refused whole, nothing changed.

As in test_bad_input.py, what is on the disk is compared before and after each refusal.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import factory
from factory import INPUT, STORAGE, USAGE, accepted, config, linear, llama, model, recipe, refused, smelt, snapshot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two sound models, m0 and m1, of two layers."""
    factory.llamas(tmp_path, 2)
    return tmp_path


# --- the output -----------------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be_made(folder: Path) -> None:
    (folder / "file").write_text("x")
    os.symlink("nowhere", folder / "dangling")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    os.mkfifo(folder / "pipe")
    tree = linear("m0", "m1")
    for out, says in {
        "file": "the output exists and is not a folder",
        "pipe": "the output exists and is not a folder",
        "dangling": "the output is a link that leads nowhere",
        "full": "the output folder is not empty",
        "file/below": "is not a folder",
        "m0": "the output folder is an input",
        "m0/new": "the output folder lies in an input",
        "m0/a/b/c": "the output folder lies in an input",
        ".": "the output folder holds an input",
    }.items():
        path = recipe(folder / "recipe.yml", tree)
        before = snapshot(folder)
        done = smelt("merge", path, folder / out)
        assert (done.code, snapshot(folder)) == (STORAGE, before), (out, done.text)
        assert says in done.err, (out, done.err)
        assert "fix: " in done.err


@pytest.mark.parametrize("out", ["m0", "m0/new", "."])
def test_overwrite_never_touches_an_input(folder: Path, out: str) -> None:
    refused(folder, linear("m0", "m1"), "--overwrite", code=STORAGE, says=["an input", "fix: "], out=out)


def test_an_input_behind_a_link_is_an_input(folder: Path) -> None:
    os.symlink("m0", folder / "link")
    refused(folder, linear("link", "m1"), "--overwrite", code=STORAGE, says=["is an input"], out="m0")
    refused(folder, linear("m0", "m1"), "--overwrite", code=STORAGE, says=["is an input"], out="link")


def test_a_model_that_only_gives_the_tokenizer_is_an_input(folder: Path) -> None:
    vocabulary = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    model(folder / "words", llama(), config(), files={"tokenizer.json": vocabulary})
    tree = linear("m0", "m1", tokenizer_source="words")
    refused(folder, tree, "--overwrite", code=STORAGE, says=["is an input"], out="words")
    accepted(folder, tree)
    assert (folder / "out" / "tokenizer.json").read_text() == vocabulary


def test_a_recipe_inside_the_output_is_an_input(folder: Path) -> None:
    accepted(folder, linear("m0", "m1"))
    mine = recipe(folder / "out" / "mine.yml", linear(folder / "m0", folder / "m1"))
    before = snapshot(folder)
    done = smelt("merge", mine, folder / "out", "--overwrite")
    assert done.code == STORAGE
    assert "the output folder holds an input" in done.err
    assert "mine.yml" in done.err
    assert snapshot(folder) == before


def test_single_files_may_lie_beside_the_output(folder: Path) -> None:
    for i in range(2):
        (folder / f"w{i}.safetensors").write_bytes(factory.file(llama(seed=i)))
    tree = linear("./w0.safetensors", "./w1.safetensors")
    accepted(folder, tree)
    refused(folder, tree, "--overwrite", code=STORAGE, says=["holds an input"], out=".")
    refused(folder, tree, "--overwrite", code=STORAGE, says=["is an input"], out="w0.safetensors")


def test_overwrite_replaces_a_folder_whole(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "stale.safetensors").write_bytes(b"old")
    accepted(folder, linear("m0", "m1"), "--overwrite")
    assert not (folder / "out" / "stale.safetensors").exists()
    assert smelt("verify", folder / "out").code == 0
    assert {path.name for path in folder.iterdir()} == {"m0", "m1", "out", "recipe.yml"}


def test_an_empty_output_folder_is_taken(folder: Path) -> None:
    (folder / "out").mkdir()
    accepted(folder, linear("m0", "m1"))


# --- small files of the donor: read before the work begins ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("tokenizer.json", lambda path: os.symlink("/etc/passwd", path), "leaves the model's folder"),
        ("LICENSE", lambda path: os.symlink("../recipe.yml", path), "leaves the model's folder"),
        ("merges.txt", lambda path: (path.touch(), os.truncate(path, 100 << 20)), "too large"),
    ],
)
def test_what_cannot_be_copied_is_told_before_anything_is_written(
    folder: Path, name: str, spoil: Callable[[Path], Any], says: str
) -> None:
    recipe(folder / "recipe.yml", linear("m0", "m1"))
    spoil(folder / "m0" / name)
    err = refused(folder, linear("m0", "m1"), code=INPUT, says=[says, name])
    assert "tensors, " not in err  # not even the plan is announced


def test_a_card_in_an_old_encoding_is_no_obstacle(folder: Path) -> None:
    (folder / "m0" / "README.md").write_bytes("---\nlicense: mit\nauthor: Jos\xe9\n---\n".encode("latin-1"))
    accepted(folder, linear("m0", "m1"))
    assert "license: mit\n" in (folder / "out" / "README.md").read_text()


# --- odd places -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["~nosuchuser/m", "a" * 300, "./" + "a/" * 3000, "/dev/null", "/", ".", "./m0/config.json"]
)
def test_names_that_are_no_model(folder: Path, name: str) -> None:
    done = smelt("merge", recipe(folder / "recipe.yml", linear(name, "m0")), folder / "out")
    assert done.code == INPUT, done.text[:500]
    assert "fix: " in done.err


def test_recipe_names_that_no_file_can_have(folder: Path) -> None:
    for name in ("a" * 5000, "a\0b"):
        done = smelt("plan", name)
        assert done.code == USAGE, done.text[:500]


def test_outputs_with_names_that_no_folder_can_have(folder: Path) -> None:
    for out in ("x" * 300, "x" * 250):
        refused(folder, linear("m0", "m1"), code=STORAGE, says=["File name too long"], out=out)


def test_names_that_are_not_utf8(folder: Path) -> None:
    os.rename(folder / "m1", os.fsencode(folder) + b"/m\xff")
    os.symlink(b"m\xff", folder / "link")
    out = Path(os.fsdecode(os.fsencode(folder) + b"/out\xff"))
    done = smelt("merge", recipe(folder / "recipe.yml", linear("m0", "link")), out)
    assert done.code == 0, done.text
    assert smelt("verify", out).code == 0
    for name in ("README.md", "mergekit_config.yml", "smelt.json"):
        assert "m?" in (out / name).read_text(encoding="utf-8")


def test_a_working_folder_that_is_gone(folder: Path) -> None:
    path = recipe(folder / "recipe.yml", linear(folder / "m0", folder / "m1"))
    for words in ((), ("--overwrite",)):
        (folder / "gone").mkdir()
        script = 'rmdir "$PWD" && exec "$@"'
        words = factory.command("merge", path, folder / "out", *words)
        done = subprocess.run(["sh", "-c", script, "sh", *words], cwd=folder / "gone", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# --- limits of the system -----------------------------------------------------------------------------------------


def limited(limit: int, value: int, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command under a limit of the system."""

    def lower() -> None:
        resource.setrlimit(limit, (value, value))

    return subprocess.run(factory.command(*words), preexec_fn=lower, capture_output=True, text=True, check=False)


def test_a_limit_on_the_size_of_files(folder: Path) -> None:
    path = recipe(folder / "recipe.yml", linear("m0", "m1"))
    before = snapshot(folder)
    done = limited(resource.RLIMIT_FSIZE, 1000, "merge", path, folder / "out")
    assert done.returncode == STORAGE, done.stderr
    assert "error: cannot reserve space for: File too large" in done.stderr
    assert snapshot(folder) == before


def test_too_few_descriptors(folder: Path) -> None:
    model(folder / "many", llama(layers=12), config(layers=12), shards=30)
    path = recipe(folder / "recipe.yml", linear("many", "many"))
    before = snapshot(folder)
    done = limited(resource.RLIMIT_NOFILE, 24, "merge", path, folder / "out")
    assert done.returncode == STORAGE, done.stderr
    assert "Too many open files" in done.stderr
    assert snapshot(folder) == before


def test_a_file_system_that_takes_nothing(folder: Path) -> None:
    done = smelt("merge", recipe(folder / "recipe.yml", linear("m0", "m1")), "/proc/smelt/out")
    assert done.code == STORAGE, done.text
    assert "cannot create folder" in done.err
