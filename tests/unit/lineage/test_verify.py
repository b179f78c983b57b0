"""`lineage.verify`: an output against its record."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import factory
import smelt
from smelt.errors import InputError, SmeltError
from smelt.lineage.record import checksum
from smelt.lineage.verify import tensor_digest, verify
from smelt.storage.sources.local import open_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    models = factory.llamas(folder, 2)
    smelt.merge(factory.linear(*models), folder / "out", shard_bytes=1200)
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return factory.copy(made, tmp_path / "out")


def change(out: Path, **changes: Any) -> None:
    """Write other values into the record, with a checksum that fits."""
    tree = json.loads((out / "smelt.json").read_text()) | changes
    (out / "smelt.json").write_text(json.dumps(tree | {"checksum": checksum(tree)}))


def messages(out: Path) -> list[str]:
    return [problem.message for problem in verify(out).problems]


def test_all_as_written(out: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = verify(out, progress=lambda done, total: calls.append((done, total)))
    weights = factory.stored(out)
    assert found.problems == ()
    assert (found.tensors, found.bytes) == (len(weights), sum(value.nbytes for value in weights.values()))
    assert found.folder == out
    assert calls[-1] == (found.bytes, found.bytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_the_digest_is_what_it_is_said_to_be(tmp_path: Path, size: int) -> None:
    data = np.arange(size, dtype=np.uint64).astype(np.uint8)
    factory.model(tmp_path / "m", {"before": np.ones(3, np.float32), "x": data})
    blocks = [xxhash.xxh3_128_digest(data[start : start + (1 << 20)].tobytes()) for start in range(0, size, 1 << 20)]
    with open_folder(tmp_path / "m", name="m") as checkpoint:
        assert tensor_digest(checkpoint, "x") == xxhash.xxh3_128_hexdigest(b"".join(blocks))


def test_a_flipped_bit_names_the_tensor_and_its_place(out: Path) -> None:
    file = sorted(out.glob("*.safetensors"))[-1]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0x80
    file.write_bytes(raw)
    (problem,) = verify(out).problems
    assert problem.message.startswith("tensor '")
    assert problem.message.endswith("is not what was written")
    assert problem.where[0].startswith(str(file))
    assert isinstance(problem, InputError)


def test_other_tensors_than_recorded(out: Path) -> None:
    tree = json.loads((out / "smelt.json").read_text())["tensors"]
    renamed = {("model.other" if name == "model.norm.weight" else name): row for name, row in tree.items()}
    change(out, tensors=renamed)
    assert messages(out) == ["1 tensor is missing that the record names", "1 tensor is not in the record"]


def test_files(out: Path) -> None:
    (out / "config.json").write_text("{}")
    (out / "README.md").unlink()
    (out / "modeling.py").write_text("x")
    assert sorted(messages(out)) == [
        "file README.md is missing",
        "file config.json is not what was written",
        "file modeling.py is not in the record",
    ]
    assert verify(out).warnings == ()


def test_what_a_publisher_does_is_a_warning(out: Path) -> None:
    (out / "notes.txt").write_text("x")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    (out / ".cache").mkdir()
    (out / "README.md").open("a").write("more about it")
    found = verify(out)
    assert found.problems == ()
    assert found.warnings == (
        "file .cache is not in the record",
        "file .gitattributes is not in the record",
        "file notes.txt is not in the record",
        "file README.md is not what was written",
    )
    with_strict = smelt.verify(out, strict=True)
    assert [problem.message for problem in with_strict.problems] == list(found.warnings)
    assert with_strict.problems[0].exit_code == 3


READ = ["x.safetensors", "pytorch_model.bin", "modeling_x.py", "generation_config.json", "tokenizer.json", "vocab.txt"]


@pytest.mark.parametrize("name", [*READ, "chat_template.jinja", "added_tokens.json", "adapter_config.json"])
def test_what_a_library_may_read_is_no_mere_warning(out: Path, name: str) -> None:
    (out / name).write_text("x")
    try:
        found = messages(out)
    except InputError as error:
        found = [error.render()]
    assert any(name in message for message in found)


def test_a_record_from_before_checksums(out: Path) -> None:
    tree = json.loads((out / "smelt.json").read_text())
    del tree["checksum"]
    (out / "smelt.json").write_text(json.dumps(tree))
    found = verify(out)
    assert found.problems == ()
    assert found.warnings == ("smelt.json has no checksum: it was written by an early version",)
    (out / "smelt.json").write_text(json.dumps(tree | {"chacksum": "x"}))
    with pytest.raises(InputError, match="is damaged"):
        verify(out)


def test_any_flipped_bit_of_the_record_is_seen(out: Path) -> None:
    raw = (out / "smelt.json").read_bytes()
    for place in range(0, len(raw), 7):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << (place % 8)
        (out / "smelt.json").write_bytes(damaged)
        with pytest.raises(SmeltError) as caught:
            verify(out)
        assert caught.value.exit_code == 3
        assert "smelt.json" in caught.value.render()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": None},
        {"tensors": []},
        {"tensors": None},
        {"files": "x"},
        {"tensors": {"a": None}},
        {"tensors": {"a": {"digest": 3}}},
        {"files": {"config.json": None}},
        {"files": {"config.json": ["x"]}},
    ],
)
def test_records_that_are_none(out: Path, changes: dict[str, Any]) -> None:
    change(out, **changes)
    with pytest.raises(SmeltError) as caught:
        verify(out)
    assert caught.value.exit_code == 3
    assert "smelt.json" in caught.value.render()


def test_names_in_the_record_lead_nowhere(out: Path) -> None:
    tree = json.loads((out / "smelt.json").read_text())["files"]
    change(out, files=tree | {"../../../../../../etc/passwd": {"sha256": "0" * 64}})
    assert messages(out) == ["file ../../../../../../etc/passwd is missing"]


def test_what_is_no_output(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none", "no folder"), (tmp_path, "no safetensors files")):
        with pytest.raises(InputError, match=says):
            verify(path)
    factory.llamas(tmp_path, 1)
    with pytest.raises(InputError, match=r"has no smelt\.json"):
        verify(tmp_path / "m0")


def test_a_link_to_an_output_and_the_folder_itself(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.symlink("out", out.parent / "link")
    assert verify(out.parent / "link").problems == ()
    monkeypatch.chdir(out)
    assert verify(".").problems == ()
