"""`--trust-digests`: the same bytes as without, whatever the system can do; a record that does not fit is not used."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt as library
from factory import INPUT, STORAGE, USAGE, config, linear, llama, model, recipe, smelt, snapshot, stored
from smelt.errors import SmeltError
from smelt.storage import copying, files

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An output of smelt in two shards, with two bad numbers: the model that the tests copy from."""
    first, second = (llama(seed=seed) for seed in (0, 1))
    for tensors in (first, second):
        tensors[NORM][:2] = np.nan, np.inf
    paths = [model(tmp_path / f"m{i}", t, config()) for i, t in enumerate((first, second))]
    library.merge(linear(*paths), tmp_path / "made", shard_bytes=1500)
    return tmp_path / "made"


def passthrough(made: Path, **keys: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(made)}]} | keys


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "smelt.json").read_text())


def altered(folder: Path, tensor: str, **row: Any) -> None:
    """Write other values into a tensor's row of the record."""
    tree = record(folder)
    tree["tensors"][tensor] |= row
    (folder / "smelt.json").write_text(json.dumps(tree))


def both(tmp_path: Path, tree: Any, **keys: Any) -> tuple[library.MergeReport, library.MergeReport]:
    """The merge without the flag, and with it; weights and records must be the same, but for marks and checksums."""
    plain = library.merge(tree, tmp_path / "plain" / "out", **keys)
    trusting = library.merge(tree, tmp_path / "trusting" / "out", trust_digests=True, **keys)
    assert weights(plain.out) == weights(trusting.out)
    here, there = record(plain.out), record(trusting.out)
    assert (here.pop("checksum") == there.pop("checksum")) == (not trusting.trusted)  # the marks are summed too
    marked = [name for name, row in there["tensors"].items() if row.pop("trusted", False)]
    assert marked == list(trusting.trusted)
    assert (plain.trusted, there) == ((), here)
    assert plain.nonfinite == trusting.nonfinite
    assert library.verify(trusting.out).problems == ()
    return plain, trusting


def refuse(number: int) -> Any:
    def call(*_: int) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("way", ["system", "portable", "EXDEV", "ENOSYS", "one byte"])
@pytest.mark.parametrize("shard_bytes", [1500, 700, 10**6])
def test_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, shard_bytes: int
) -> None:
    if way == "portable":
        monkeypatch.setattr(files, "PORTABLE", True)
    elif way == "one byte":
        whole = copying._copy_some
        monkeypatch.setattr(copying, "_copy_some", lambda s, t, size, start, at: whole(s, t, 1, start, at))
    elif way != "system":
        monkeypatch.setattr(copying, "_copy_some", refuse(getattr(errno, way)))
    _, trusting = both(tmp_path, passthrough(made), shard_bytes=shard_bytes)
    assert set(trusting.trusted) == set(stored(made))
    assert trusting.nonfinite == {NORM: 2}
    assert "2 numbers of the output are NaN or infinite" in trusting.warnings[0]


def test_trusted_tensors_are_not_read(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.storage.checkpoint import Checkpoint

    read: set[str] = set()
    whole = Checkpoint.read_into

    def note(self: Checkpoint, spec: Any, start: int, stop: int, buffer: Any) -> None:
        read.add(spec.name)
        whole(self, spec, start, stop, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", note)
    library.merge(passthrough(made), tmp_path / "out", trust_digests=True)
    shards = {path.name for path in made.glob("*.safetensors")}
    assert len(shards) > 1
    assert len(read) == len(shards)  # one sample of each
    assert NORM not in read


def test_only_copies_are_trusted(made: Path, tmp_path: Path) -> None:
    scale = [{"filter": "mlp", "value": 0.5}, {"value": 1}]
    _, trusting = both(tmp_path, passthrough(made, parameters={"scale": scale}))
    assert UP not in trusting.trusted
    assert NORM in trusting.trusted
    rows = record(trusting.out)["tensors"]
    assert "trusted" not in rows[UP]
    assert (rows[NORM]["trusted"], rows[NORM]["nonfinite"]) == (True, 2)


def test_layers_get_the_digests_of_their_sources(made: Path, tmp_path: Path) -> None:
    ranges = [[1, 2], [0, 2]]
    slices = [{"sources": [{"model": str(made), "layer_range": pair}]} for pair in ranges]
    _, trusting = both(tmp_path, {"merge_method": "passthrough", "slices": slices})
    assert len(trusting.trusted) == len(trusting.plan.entries)
    rows, theirs = record(trusting.out)["tensors"], record(made)["tensors"]
    assert rows[UP]["digest"] == theirs[UP.replace("layers.0", "layers.1")]["digest"]


def test_integers_that_all_share(tmp_path: Path) -> None:
    ids = {"model.ids": np.arange(9)}
    paths = [model(tmp_path / f"m{i}", llama(seed=i) | ids, config()) for i in range(2)]
    for i, path in enumerate(paths):
        library.merge(passthrough(path), tmp_path / f"made{i}")
    _, trusting = both(tmp_path, linear(tmp_path / "made0", tmp_path / "made1"))
    assert trusting.trusted == ("model.ids",)


def test_a_trusted_output_is_trusted_again(made: Path, tmp_path: Path) -> None:
    library.merge(passthrough(made), tmp_path / "first", trust_digests=True)
    _, second = both(tmp_path, passthrough(tmp_path / "first"))
    assert len(second.trusted) == len(stored(made))


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_what_the_flag_risks_is_found_by_verify(made: Path, tmp_path: Path) -> None:
    altered(made, NORM, digest="0" * 32, nonfinite=0)
    done = library.merge(passthrough(made), tmp_path / "out", trust_digests=True)
    assert done.nonfinite == {}  # what is trusted wrongly is told wrongly
    assert stored(tmp_path / "out")[NORM].tobytes() == stored(made)[NORM].tobytes()
    (problem,) = library.verify(tmp_path / "out").problems
    assert problem.message == f"tensor '{NORM}' does not have the digest that --trust-digests took over"
    assert problem.fix is not None
    assert "without --trust-digests" in problem.fix
    found = smelt("verify", tmp_path / "out")
    assert (found.code, NORM in found.err) == (INPUT, True)


def flip(folder: Path) -> None:
    """Change one bit of the last tensor of every weight file: such as q_proj of another fine-tune has."""
    for path in folder.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        for place in range(start, len(content)):
            content[place] ^= 1
        path.write_bytes(content)


def resized(folder: Path) -> None:
    tree = record(folder)
    next(iter(tree["files"].values()))["size"] += 1
    (folder / "smelt.json").write_text(json.dumps(tree))


MISFITS = {
    "no record": (lambda folder: (folder / "smelt.json").unlink(), "has no effect: no model that they come from has"),
    "not JSON": (lambda folder: (folder / "smelt.json").write_text("{"), "is not trusted"),
    "another form": (lambda folder: (folder / "smelt.json").write_text('{"format": 2}'), "not a record that this"),
    "another size": (resized, "another size or header than it names"),
    "a digest that is none": (lambda folder: altered(folder, UP, digest="x" * 32), f"damaged at tensor '{UP}'"),
    "a number as digest": (lambda folder: altered(folder, UP, digest=5), f"damaged at tensor '{UP}'"),
    "a count that is none": (lambda folder: altered(folder, UP, nonfinite=True), f"damaged at tensor '{UP}'"),
    "more bad numbers than numbers": (lambda folder: altered(folder, UP, nonfinite=10**6), f"damaged at tensor '{UP}'"),
    "other weights": (flip, "has another digest than it names"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_record_that_does_not_fit_is_not_used(made: Path, tmp_path: Path, name: str) -> None:
    change, said = MISFITS[name]
    change(made)
    plain, trusting = both(tmp_path, passthrough(made))
    assert trusting.trusted == ()
    (warning,) = set(trusting.warnings) - set(plain.warnings)
    assert said in warning
    before = snapshot(tmp_path)
    done = smelt("merge", recipe(tmp_path / "r.yml", passthrough(made)), tmp_path / "o", "--trust-digests", "--strict")
    assert done.code == USAGE
    assert said in done.err
    assert snapshot(tmp_path) == before | {"r.yml": snapshot(tmp_path)["r.yml"]}


def test_nothing_is_copied(made: Path, tmp_path: Path) -> None:
    done = library.merge(linear(made, made, out_dtype="float64"), tmp_path / "out", trust_digests=True)
    assert "--trust-digests has no effect: no tensor is copied as it is" in done.warnings


def test_models_without_a_record_are_read(made: Path, tmp_path: Path) -> None:
    slices = [{"sources": [{"model": str(path), "layer_range": [0, 1]}]} for path in (made, tmp_path / "m0")]
    _, trusting = both(tmp_path, {"merge_method": "passthrough", "slices": slices})
    assert UP in trusting.trusted
    assert UP.replace("layers.0", "layers.1") not in trusting.trusted
    assert not any("trust" in warning for warning in trusting.warnings)


def test_a_truncated_file_is_refused(made: Path, tmp_path: Path) -> None:
    path = sorted(made.glob("*.safetensors"))[0]
    os.truncate(path, path.stat().st_size - 1)
    before = snapshot(tmp_path)
    with pytest.raises(SmeltError):
        library.merge(passthrough(made), tmp_path / "out", trust_digests=True)
    assert snapshot(tmp_path) == before


def test_a_file_that_shrinks_while_it_is_copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sorted(made.glob("*.safetensors"))[0]
    whole = copying._copy_some

    def shrink(source: int, target: int, size: int, start: int, at: int) -> int:
        if path.stat().st_size:
            os.truncate(path, 0)
        return whole(source, target, size, start, at)

    monkeypatch.setattr(copying, "_copy_some", shrink)
    with pytest.raises(SmeltError, match=r"cut off|changed"):
        library.merge(passthrough(made), tmp_path / "out", trust_digests=True)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_every_call_that_fails_loses_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Each copy within the system fails once, with an error that is one."""
    library.merge(passthrough(made), tmp_path / "want")
    if overwrite:
        library.merge(linear(made, made), tmp_path / "out")
    whole = copying._copy_some
    calls = failing = 0

    def fail(source: int, target: int, size: int, start: int, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, "Input/output error")
        return whole(source, target, size, start, at)

    monkeypatch.setattr(copying, "_copy_some", fail)
    path = recipe(tmp_path / "recipe.yml", passthrough(made))
    before = snapshot(tmp_path)
    words = ["merge", path, tmp_path / "out", "--trust-digests", "--threads", "1", "-q"]
    for failing in range(1, 100):  # noqa: B007
        calls = 0
        done = smelt(*words, *(["--overwrite"] if overwrite else []))
        if done.code == 0:
            break
        assert (done.code, "cannot copy: Input/output error" in done.err) == (STORAGE, True)
        assert snapshot(tmp_path) == before
    assert failing > len(stored(made))
    assert weights(tmp_path / "out") == weights(tmp_path / "want")


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(made: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yml", passthrough(made))
    done = smelt("merge", path, tmp_path / "out", "--trust-digests")
    assert done.code == 0, done.text
    assert f"note: {len(stored(made))} tensors copied unread, with the digests of their models' records" in done.err
    told = smelt("merge", path, tmp_path / "again", "--trust-digests", "--json").json
    assert (told["trusted"], told["nonfinite"]) == (len(stored(made)), {NORM: 2})
    assert smelt("merge", path, tmp_path / "plain", "--json").json["trusted"] == 0


def test_one_model_averaged_alone_is_copied(tmp_path: Path) -> None:
    """Also where a slice of a merge has one source; the bits are those that the arithmetic gave."""
    path = model(tmp_path / "m", llama(dtype=np.float32) | {"model.wide": np.array([1 / 3])}, config())
    alone = linear(path, parameters={"weight": 0.3})
    done = library.merge(alone, tmp_path / "out")
    actions = {entry.name: entry.action.value for entry in done.plan.entries}
    assert actions.pop("model.wide") == "merge"
    assert set(actions.values()) == {"copy"}
    assert stored(tmp_path / "out")["model.wide"] == np.float32(1 / 3)
    assert stored(tmp_path / "out")[UP].tobytes() == stored(path)[UP].tobytes()
