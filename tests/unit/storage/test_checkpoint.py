"""`storage.checkpoint` and `sources.memory`: the same reading interface over files and over arrays."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from smelt import dtypes
from smelt.errors import InputError
from smelt.specs import TensorSpec
from smelt.storage import checkpoint as checkpoint_module
from smelt.storage.checkpoint import Checkpoint, TensorSource
from smelt.storage.sources.local import open_folder
from smelt.storage.sources.memory import MemoryCheckpoint

SHARDS = {
    "model-00001-of-00002.safetensors": {"b": [7], "a": [2, 3]},
    "model-00002-of-00002.safetensors": {"d": [0, 5], "c": []},
}


@pytest.fixture
def folder(tmp_path: Path, encoder) -> Path:
    return encoder.model(tmp_path / "model", SHARDS)


@pytest.fixture(params=["files", "memory"])
def source(request: pytest.FixtureRequest, folder: Path):
    """One model, read from its files and from memory."""
    opened = open_folder(folder, name="org/m")
    if request.param == "files":
        yield opened
    else:
        tensors = {}
        for name, spec in opened.tensors.items():
            data = np.empty(spec.nbytes, np.uint8)
            opened.read_into(spec, 0, spec.nbytes, data)
            tensors[name] = (spec, data)
        documents = {"config.json": (folder / "config.json").read_bytes()}
        yield MemoryCheckpoint("org/m", tensors, documents=documents)
    opened.close()


# --- both alike -----------------------------------------------------------------------------------------------------


def test_every_range_of_every_tensor(source: TensorSource, portable: bool) -> None:
    assert list(source.tensors) == ["b", "a", "d", "c"]
    expected = {"b": bytes(range(7)), "a": bytes(range(7, 13)), "d": b"", "c": b"\0"}
    for name, spec in source.tensors.items():
        for start in range(spec.nbytes + 1):
            for stop in range(start, spec.nbytes + 1):
                buffer = bytearray(stop - start)
                source.read_into(spec, start, stop, buffer)
                assert buffer == expected[name][start:stop]


def test_ranges_and_buffers_that_do_not_fit(source: TensorSource) -> None:
    spec = source.tensors["b"]
    for start, stop, size in ((-1, 1, 2), (0, 8, 8), (3, 2, 0), (0, 2, 3), (0, 2, 1)):
        with pytest.raises(ValueError, match="b \\[7\\] uint8"):
            source.read_into(spec, start, stop, bytearray(size))


def test_small_files(source: TensorSource) -> None:
    assert source.name == "org/m"
    assert source.json("config.json") == {"model_type": "llama"}
    assert source.text("config.json") == '{"model_type": "llama"}'
    assert source.bytes("config.json") == b'{"model_type": "llama"}'
    assert source.json("no.json") is source.text("no") is source.bytes("no") is None
    assert source.other_files() == ["config.json"]
    assert source.changed() == []


def test_one_buffer_for_each_thread(source: TensorSource, portable: bool) -> None:
    spec = source.tensors["a"]

    def work(number: int) -> bool:
        buffer = np.empty(2, np.uint8)
        at = number % 4
        source.read_into(spec, at, at + 2, buffer)
        return list(buffer) == [7 + at, 8 + at]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))


def test_memory_arrays_must_match_their_specs() -> None:
    spec = TensorSpec("w", dtypes.F32, (2,))
    MemoryCheckpoint("m", {"w": (spec, np.zeros((2, 4), np.uint8))})
    for data in (np.zeros(7, np.uint8), np.zeros(8, np.int8)):
        with pytest.raises(ValueError, match="not the 8 bytes"):
            MemoryCheckpoint("m", {"w": (spec, data)})


# --- files only -----------------------------------------------------------------------------------------------------


def test_file_infos(folder: Path) -> None:
    with open_folder(folder, name="m") as model:
        assert model.root == folder
        assert [info.name for info in model.files] == sorted(SHARDS)
        for info in model.files:
            assert info.size == info.path.stat().st_size
            assert len(info.header_digest) == 32
            assert info.blob_sha256 is None


def test_files_open_once_at_first_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_folder(folder, name="m")
    opened = []
    real = checkpoint_module.files.open_read
    monkeypatch.setattr(checkpoint_module.files, "open_read", lambda path: opened.append(path.name) or real(path))
    barrier = threading.Barrier(8)

    def work(_: int) -> None:
        barrier.wait()
        model.read_into(model.tensors["b"], 0, 7, bytearray(7))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert opened == ["model-00001-of-00002.safetensors"]
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.read_into(model.tensors["b"], 0, 7, bytearray(7))


def test_changes_are_noticed(folder: Path) -> None:
    first, second = sorted(SHARDS)
    with open_folder(folder, name="m") as model:
        model.read_into(model.tensors["b"], 0, 7, bytearray(7))
        assert model.changed() == []
        os.utime(folder / first, ns=(1, 1))
        assert model.changed() == [first]
        (folder / "new").write_bytes((folder / second).read_bytes())
        (folder / "new").replace(folder / second)
        assert model.changed() == [first, second]
        with pytest.raises(InputError, match="changed after smelt had read its header"):
            model.read_into(model.tensors["c"], 0, 1, bytearray(1))
        (folder / first).unlink()
        assert model.changed() == [first, second]


def test_a_file_cut_off_during_the_run(folder: Path) -> None:
    with open_folder(folder, name="m") as model:
        model.read_into(model.tensors["b"], 0, 1, bytearray(1))
        os.truncate(model.files[0].path, model.files[0].size - 3)
        with pytest.raises(InputError, match="ends early"):
            model.read_into(model.tensors["a"], 0, 6, bytearray(6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'"text"', "must hold a JSON object"),
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b'{"a": "\xe9"}', "not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        (b'{"a":' + b"[" * 200_000, "nested 200001 deep"),
        (b'{"a":' * 200_000, "nested 200000 deep"),
        (b'{"a": 0x10}', "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
    ],
)
def test_bad_json_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with open_folder(folder, name="org/m") as model, pytest.raises(InputError, match=message) as caught:
        model.json("config.json")
    assert caught.value.where == ("org/m: config.json",)


def test_what_real_configs_hold(folder: Path) -> None:
    text = '{"time_step_limit": [0.0, Infinity], "longest": 1000000000000000019884624838656, "é": "\\ud83d\\ude00"}'
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    with open_folder(folder, name="m") as model:
        assert model.json("config.json") == json.loads(text)
        assert model.text("config.json") == text


def test_sizes_are_capped(folder: Path) -> None:
    for name, limit in (("config.json", 16 << 20), ("tokenizer.json", 64 << 20)):
        with open(folder / name, "wb") as file:
            file.truncate(limit + 1)
        with open_folder(folder, name="m") as model, pytest.raises(InputError, match="too large"):
            model.bytes(name)


def test_no_name_and_no_link_leads_out(folder: Path) -> None:
    secret = folder.parent / "secret.json"
    secret.write_text("{}")
    os.symlink(secret, folder / "tokenizer.json")
    os.symlink("config.json", folder / "inside.json")
    os.symlink("nowhere", folder / "dangling.json")
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.json").mkdir()
    with open_folder(folder, name="m") as model:
        for name in ("../secret.json", str(secret), "..", "", "a\0b", "folder.json/x"):
            with pytest.raises(InputError, match="not a plain file name"):
                model.bytes(name)
        for name, message in {
            "tokenizer.json": "leaves the model's folder",
            "dangling.json": "leads nowhere",
            "pipe.json": "not a regular file",
            "folder.json": "not a regular file",
        }.items():
            with pytest.raises(InputError, match=message):
                model.json(name)
        assert model.json("inside.json") == {"model_type": "llama"}
        assert model.path("inside.json") == folder / "config.json"
        assert model.path("missing") is None
        assert model.other_files() == ["config.json", "inside.json", "tokenizer.json"]


def test_other_files_hold_no_weights(folder: Path) -> None:
    for name in ("README.md", "tokenizer.model", "pytorch_model.bin", "x.gguf", ".hidden", "LICENSE"):
        (folder / name).touch()
    (folder / "onnx").mkdir()
    with open_folder(folder, name="m") as model:
        assert model.other_files() == ["LICENSE", "README.md", "config.json", "tokenizer.model"]
        assert isinstance(model, Checkpoint)
