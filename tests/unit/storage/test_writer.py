"""`storage.layout` and `storage.writer`: every byte has its place, and an output is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt import dtypes
from smelt.errors import InputError, SmeltError, StorageError
from smelt.storage import files, header
from smelt.storage.sources.local import open_folder
from smelt.storage.writer import Build, Layout, OutputTensor, heal, layout

INDEX = "model.safetensors.index.json"
TENSORS = [
    OutputTensor("a.bias", dtypes.BF16, (3,)),
    OutputTensor("a.weight", dtypes.F32, (2, 3)),
    OutputTensor("empty", dtypes.F32, (0, 4)),
    OutputTensor("scalar", dtypes.BY_CODE["I64"], ()),
    OutputTensor("ünï/ ☃", dtypes.BY_CODE["U8"], (5,)),
]


def content_of(tensor: OutputTensor) -> bytes:
    size = tensor.dtype.nbytes(int(np.prod(tensor.shape, dtype=np.int64)))
    return bytes((len(tensor.name) * 7 + number) % 120 for number in range(size))


def fill(build: Build, tensors: list[OutputTensor] = TENSORS, *, piece: int = 5) -> None:
    for tensor in tensors:
        content = content_of(tensor)
        for start in range(0, len(content), piece):
            build.write(tensor.name, start, content[start : start + piece])


def write(
    out: Path, tensors: list[OutputTensor] = TENSORS, *, shard_bytes: int = 1 << 30, overwrite: bool = False
) -> None:
    with Build.start(out, layout(tensors, shard_bytes=shard_bytes), overwrite=overwrite) as build:
        fill(build, tensors)
        build.put("config.json", b"{}")
        build.commit()


def check(out: Path, tensors: list[OutputTensor] = TENSORS) -> None:
    """The output holds exactly these tensors with their bytes, by smelt's reading and by the library's."""
    with open_folder(out, name="out") as model:
        assert model.tensors.keys() == {tensor.name for tensor in tensors}
        for tensor in tensors:
            spec = model.tensors[tensor.name]
            buffer = bytearray(spec.nbytes)
            model.read_into(spec, 0, spec.nbytes, buffer)
            assert (spec.dtype, spec.shape, bytes(buffer)) == (tensor.dtype, tensor.shape, content_of(tensor))
        for info in model.files:
            for name, entry in safetensors.deserialize(info.path.read_bytes()):
                assert entry["data"] == content_of(next(t for t in tensors if t.name == name))


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- layout ---------------------------------------------------------------------------------------------------------


def test_one_shard_needs_no_index() -> None:
    found = layout(TENSORS, shard_bytes=1 << 30)
    assert [shard.file for shard in found.shards] == ["model.safetensors"]
    assert found.index is None
    assert found.total_bytes == found.shards[0].size
    assert list(found.shards[0].tensors) == ["scalar", "a.weight", "empty", "a.bias", "ünï/ ☃"]
    assert found.spec("a.bias").offset == len(found.shards[0].header) + 32


def test_shards_are_filled_in_the_order_given() -> None:
    sizes = [4, 4, 1, 20, 5, 5, 10, 0]
    tensors = [OutputTensor(f"t{n}", dtypes.BY_CODE["U8"], (size,)) for n, size in enumerate(sizes)]
    found = layout(tensors, shard_bytes=10)
    assert [list(shard.tensors) for shard in found.shards] == [["t0", "t1", "t2"], ["t3"], ["t4", "t5"], ["t6", "t7"]]
    assert found.shards[1].file == "model-00002-of-00004.safetensors"
    index = json.loads(found.index or b"")
    assert index["metadata"] == {"total_parameters": 49, "total_size": 49}
    assert list(index["weight_map"]) == sorted(tensor.name for tensor in tensors)
    assert index["weight_map"]["t3"] == found.spec("t3").file == found.shards[1].file


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["F64", "F32", "BF16", "U8", "C64", "F4", "F6_E2M3"]),
            st.lists(st.sampled_from([0, 1, 2, 3, 4]), max_size=2).map(lambda shape: [*shape, 4]),
        ),
        max_size=12,
    ),
    st.integers(1, 200),
)
def test_every_layout_is_sound_and_aligned(drawn: list[tuple[str, list[int]]], shard_bytes: int) -> None:
    tensors = [OutputTensor(f"t{n}", dtypes.BY_CODE[code], tuple(shape)) for n, (code, shape) in enumerate(drawn)]
    found = layout(tensors, shard_bytes=shard_bytes)
    for shard in found.shards:
        data = shard.size - len(shard.header)
        assert data <= shard_bytes or sum(1 for spec in shard.tensors.values() if spec.nbytes) == 1
        assert header.parse(shard.header[8:], data_bytes=data, file=shard.file).tensors == shard.tensors
        for spec in shard.tensors.values():
            assert spec.offset % max(spec.dtype.bits // 8, 1) == 0
    assert {tensor.name for tensor in tensors} == {name for shard in found.shards for name in shard.tensors}
    assert found.total_bytes == sum(shard.size for shard in found.shards) + len(found.index or b"")


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_names_that_cannot_be_written(shard_bytes: int) -> None:
    for names in (["a", "b", "a"], ["__metadata__"], ["\ud800"]):
        with pytest.raises(InputError):
            layout([OutputTensor(name, dtypes.F32, (1,)) for name in names], shard_bytes=shard_bytes)
    with pytest.raises(ValueError, match="at least 1"):
        layout([], shard_bytes=0)


def test_sixty_thousand_tensors_are_laid_out() -> None:
    tensors = [OutputTensor(f"layers.{n}.weight", dtypes.BF16, (64, 64)) for n in range(60_000)]
    found = layout(tensors, shard_bytes=50_000_000)
    assert len(found.shards) == 10  # 6103 tensors of 8 KiB fit in each


# --- a whole build --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 12, 1 << 30])
def test_build_commit_and_read(tmp_path: Path, portable: bool, shard_bytes: int) -> None:
    write(tmp_path / "out", shard_bytes=shard_bytes)
    check(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]
    assert (INDEX in names_in(tmp_path / "out")) == (shard_bytes < 1 << 30)


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_the_libraries_load_it(tmp_path: Path, shard_bytes: int) -> None:
    torch = pytest.importorskip("torch")
    write(tmp_path / "out", shard_bytes=shard_bytes)
    expected = dict.fromkeys(tensor.name for tensor in TENSORS)
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            expected.update({name: opened.get_tensor(name) for name in list(opened.keys())})
    for tensor in TENSORS:
        loaded = expected[tensor.name]
        assert loaded is not None
        assert (str(loaded.dtype), tuple(loaded.shape)) == (f"torch.{tensor.dtype.name}", tensor.shape)
        assert loaded.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == content_of(tensor)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write(tmp_path / "out", [])
    check(tmp_path / "out", [])


def test_threads_write_and_read_back(tmp_path: Path, portable: bool) -> None:
    tensors = [OutputTensor(f"t{n}", dtypes.BF16, (500,)) for n in range(40)]
    with Build.start(tmp_path / "out", layout(tensors, shard_bytes=7000), overwrite=False) as build:

        def work(tensor: OutputTensor) -> bool:
            fill(build, [tensor], piece=77)
            buffer = bytearray(600)
            build.read_back(tensor.name, 100, 700, buffer)
            return bytes(buffer) == content_of(tensor)[100:700]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, tensors))
        build.commit()
    check(tmp_path / "out", tensors)


def test_until_commit_nothing_looks_like_a_checkpoint(tmp_path: Path) -> None:
    with Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=False) as build:
        fill(build)
        assert names_in(tmp_path) == [".out.smelt-build", ".out.smelt-build.lock"]
        for path in build.folder.iterdir():
            assert path.read_bytes()[:9] == bytes(8) + b"{"
            with pytest.raises(safetensors.SafetensorError):
                safetensors.safe_open(path, framework="np").__enter__()
        with pytest.raises(SmeltError):
            open_folder(build.folder, name="unfinished")


def test_space_is_reserved_for_all_files_at_start(tmp_path: Path) -> None:
    found = layout(TENSORS, shard_bytes=12)
    with Build.start(tmp_path / "out", found, overwrite=False) as build:
        assert {path.name: path.stat().st_size for path in build.folder.iterdir()} == {
            shard.file: shard.size for shard in found.shards
        }


def test_a_forgotten_tensor_is_not_committed(tmp_path: Path) -> None:
    with Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=False) as build:
        fill(build, TENSORS[1:])
        build.write("a.bias", 0, content_of(TENSORS[0])[:5])
        with pytest.raises(ValueError, match=r"1 tensors were not written to their end, such as 'a\.bias'"):
            build.commit()
    assert names_in(tmp_path) == []


def test_bytes_outside_a_tensor_are_refused(tmp_path: Path) -> None:
    with Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=1 << 30), overwrite=False) as build:
        for start, data in ((-1, b"a"), (5, b"ab"), (6, b"a")):
            with pytest.raises(ValueError, match=r"outside a\.bias"):
                build.write("a.bias", start, data)
            with pytest.raises(ValueError, match=r"outside a\.bias"):
                build.read_back("a.bias", start, start + len(data), bytearray(data))
        with pytest.raises(ValueError, match="buffer of 1 bytes"):
            build.read_back("a.bias", 0, 2, bytearray(1))
        with pytest.raises(KeyError):
            build.write("nobody", 0, b"")


def test_small_files_beside(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    with Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=False) as build:
        fill(build)
        build.put("README.md", "ä".encode())
        build.copy("tokenizer.json", tmp_path / "tokenizer.json")
        with pytest.raises(StorageError, match="File exists"):
            build.put("README.md", b"")
        for name in ("../x", "/x", "a/b", "", "..", "nul\0", INDEX, build.layout.shards[0].file):
            with pytest.raises(ValueError, match="cannot add"):
                build.put(name, b"")
            with pytest.raises(ValueError, match="cannot add"):
                build.copy(name, tmp_path / "tokenizer.json")
        build.commit()
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "ä"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    check(tmp_path / "out")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_umask_is_respected(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out", shard_bytes=12)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {mode}
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2


def test_missing_parents_are_made_and_unmade(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    Build.start(out, layout(TENSORS, shard_bytes=12), overwrite=False).abandon()
    assert names_in(tmp_path) == []
    write(out)
    check(out)


@pytest.mark.parametrize("name", ["out", "out/", "./x/../out", "ünï cödé"])
def test_ways_to_write_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    write(Path(name))
    check(Path(name))


# --- giving up ------------------------------------------------------------------------------------------------------


def test_abandon_leaves_nothing(tmp_path: Path) -> None:
    build = Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=False)
    fill(build)
    build.put("README.md", b"")
    build.abandon()
    build.abandon()
    assert names_in(tmp_path) == []
    with pytest.raises(ValueError, match="already"):
        build.commit()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=False):
        raise error
    assert names_in(tmp_path) == []


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    with Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=False) as build:
        with pytest.raises(StorageError, match="another smelt run is writing"):
            Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=True)
        fill(build)
        build.commit()
    check(tmp_path / "out")


def test_a_stale_build_is_replaced(tmp_path: Path) -> None:
    stale = tmp_path / ".out.smelt-build"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".out.smelt-build.lock").touch()
    write(tmp_path / "out")
    check(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]


def test_the_place_of_the_build_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    os.symlink("precious", tmp_path / ".out.smelt-build")
    with pytest.raises(StorageError, match="name is taken"):
        write(tmp_path / "out")
    assert names_in(tmp_path) == [".out.smelt-build", "precious"]


# --- what stands in the way -----------------------------------------------------------------------------------------


def refused(out: Path, message: str, *, overwrite: bool = False) -> None:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(StorageError, match=message) as caught:
        Build.start(out, layout(TENSORS, shard_bytes=12), overwrite=overwrite)
    assert caught.value.exit_code == 4
    assert sorted(out.parent.rglob("*")) == before


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for overwrite in (False, True):
        refused(tmp_path / "file", "not a folder", overwrite=overwrite)
        refused(tmp_path / "pipe", "not a folder", overwrite=overwrite)
        refused(tmp_path / "dangling", "leads nowhere", overwrite=overwrite)
        refused(tmp_path / "loop", "leads nowhere", overwrite=overwrite)
        refused(tmp_path / "file" / "out", "parent is not a folder", overwrite=overwrite)
        refused(tmp_path / ("x" * 250), "File name too long", overwrite=overwrite)
    refused(tmp_path / "full", "not empty.*--overwrite")
    with pytest.raises(StorageError, match="root folder"):
        Build.start(Path("/"), layout(TENSORS, shard_bytes=12), overwrite=True)


def test_an_output_whose_loss_would_hurt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "full" / "sub")
    refused(tmp_path / "full", "it holds", overwrite=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / ".git").mkdir()
    refused(tmp_path / "full", "a git repository", overwrite=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    refused(tmp_path / "full", "a mount point", overwrite=True)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    refused(tmp_path / "out", "not enough space: 16.8 MB needed, 1 KB free")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    check(tmp_path / "out")


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink("real", tmp_path / "out")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    check(tmp_path / "real")
    assert names_in(tmp_path) == ["out", "real"]


# --- overwriting ----------------------------------------------------------------------------------------------------

OTHER = [OutputTensor("other", dtypes.F16, (4,))]


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", OTHER)
    (tmp_path / "out" / "stale.safetensors").touch()
    (tmp_path / "out" / "folder").mkdir()
    with Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=True) as build:
        fill(build)
        check_old = names_in(tmp_path / "out")
        build.commit()
    assert "stale.safetensors" in check_old
    check(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]
    assert "stale.safetensors" not in names_in(tmp_path / "out")


def test_an_abandoned_overwrite_keeps_the_old(tmp_path: Path) -> None:
    write(tmp_path / "out", OTHER)
    with Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=True) as build:
        fill(build)
    check(tmp_path / "out", OTHER)
    assert names_in(tmp_path) == ["out"]


def test_an_output_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    """Somebody fills OUT while we build, without --overwrite: their data are not ours to replace."""
    with Build.start(tmp_path / "out", layout(TENSORS, shard_bytes=12), overwrite=False) as build:
        fill(build)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        with pytest.raises(StorageError, match="not empty"):
            build.commit()
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["theirs"]


# --- faults: call k fails, or the process dies at call k --------------------------------------------------------------


def state(tmp_path: Path) -> str:
    """What a user finds at OUT: "old", "new" or "nothing"; anything half done fails the test."""
    out = tmp_path / "out"
    if not out.exists():
        return "nothing"
    try:
        check(out, OTHER)
    except AssertionError:
        check(out)
        assert (out / "config.json").read_bytes() == b"{}"
        return "new"
    return "old"


@pytest.mark.parametrize("overwrite", [False, True])
def test_every_call_that_fails(tmp_path: Path, faults, overwrite: bool) -> None:
    outcomes = set()
    for at in range(400):
        place = tmp_path / str(at)
        faults.at = -1
        place.mkdir()
        if overwrite:
            write(place / "out", OTHER)
        faults.calls.clear()
        faults.at = at
        error = None
        try:
            write(place / "out", shard_bytes=12, overwrite=overwrite)
        except StorageError as caught:
            error = caught
        failed = faults.calls[at] if at < len(faults.calls) else None
        faults.at = -1
        found = state(place)
        outcomes.add((failed, error is None, found))
        if error is not None and "is in place" not in error.message:
            assert found == ("old" if overwrite else "nothing"), failed
            left = set(names_in(place)) - {"out"}
            assert left == set() or (failed in {"lock", "look at"} and left == {".out.smelt-build.lock"})
        else:
            assert found == "new"
        heal(place / "out")
        assert state(place) == found
        write(place / "out", shard_bytes=12, overwrite=True)  # whatever was left is no obstacle
        assert state(place) == "new"
        assert names_in(place) == ["out"]
        shutil.rmtree(place)
        if failed is None:
            break
    assert failed is None
    assert {what for what, passed, _ in outcomes if not passed} >= {
        "open",
        "write",
        "sync",
        "sync folder",
        "close",
        "lock",
    }


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_every_call(tmp_path: Path, kill, overwrite: bool, after: bool) -> None:
    """Die at call k (before or after it takes place): OUT is old, new or absent, and the next command heals it."""
    seen = set()
    kill.after = after
    for kill.at in range(400):
        place = tmp_path / str(kill.at)
        place.mkdir()
        if overwrite:
            write(place / "out", OTHER)
        with kill:
            write(place / "out", shard_bytes=12, overwrite=overwrite)
        if not kill.dead:
            break
        found = state(place)
        seen.add(found)
        if overwrite and found == "nothing":
            assert (place / ".out.smelt-old").exists()
        heal(place / "out")
        assert state(place) == ("old" if overwrite and found == "nothing" else found)
        assert not (place / ".out.smelt-old").exists()
        write(place / "out", shard_bytes=12, overwrite=True)
        assert state(place) == "new"
        assert names_in(place) == ["out"]
        shutil.rmtree(place)
    assert not kill.dead
    assert seen == ({"old", "new", "nothing"} if overwrite else {"nothing", "new"})


def test_heal_does_not_choose_between_two_outputs(tmp_path: Path) -> None:
    write(tmp_path / "out", OTHER)
    (tmp_path / "out").rename(tmp_path / ".out.smelt-old")
    (tmp_path / ".out.smelt-build").mkdir()
    write(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    for act in (lambda: heal(tmp_path / "out"), lambda: write(tmp_path / "out", overwrite=True)):
        with pytest.raises(StorageError, match="keep one of the two"):
            act()
    check(tmp_path / "out")
    check(tmp_path / ".out.smelt-old", OTHER)


def test_heal_with_nothing_to_do(tmp_path: Path) -> None:
    heal(tmp_path / "out")
    write(tmp_path / "out")
    heal(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]
    found: Layout = layout(TENSORS, shard_bytes=12)
    build = Build.start(tmp_path / "out", found, overwrite=True)
    heal(tmp_path / "out")  # a run at work, but no former output aside
    build.abandon()
