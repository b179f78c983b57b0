"""`storage.sources`: which files make a checkpoint, what is refused, and the hub cache without a network."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import MappingProxyType

import pytest

from smelt.errors import InputError, ManyProblems, SmeltError
from smelt.storage.sources import hub
from smelt.storage.sources.local import open_folder

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {ONE: {"a": [2]}, TWO: {"b": [3], "c": [1]}}
INDEX = "model.safetensors.index.json"


def problems_of(path: Path) -> list[SmeltError]:
    with pytest.raises(SmeltError) as caught:
        open_folder(path, name="org/m")
    assert caught.value.exit_code == 3
    assert all("org/m" in " ".join(problem.where) for problem in caught.value.problems), caught.value.render()
    return list(caught.value.problems)


def problem_of(path: Path) -> str:
    found = problems_of(path)
    assert len(found) == 1
    return found[0].render()


def rewrite_index(folder: Path, weight_map: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# --- what is accepted -----------------------------------------------------------------------------------------------


def test_one_file(tmp_path: Path, encoder) -> None:
    encoder.write(tmp_path / "m" / "model.safetensors", {"a": [2], "b": [3]})
    encoder.write(tmp_path / "m" / "consolidated.safetensors", {"x": [2]})
    encoder.write(tmp_path / "m" / "adapter_model.safetensors", {"y": [2]})
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors"):
        with open_folder(path, name="m") as model:
            assert (list(model.tensors), model.root) == (["a", "b"], tmp_path / "m")
            assert model.tensors["b"].file == "model.safetensors"


def test_any_file_given_directly(tmp_path: Path, encoder) -> None:
    encoder.write(tmp_path / "odd.safetensors", {"a": [2]})
    with open_folder(tmp_path / "odd.safetensors", name="m") as model:
        assert list(model.tensors) == ["a"]


def test_shards_with_an_index(tmp_path: Path, encoder) -> None:
    encoder.model(tmp_path / "m", SHARDS)
    encoder.write(tmp_path / "m" / "consolidated.safetensors", {"a": [2]})
    with open_folder(tmp_path / "m", name="m") as model:
        assert list(model.tensors) == ["a", "b", "c"]
        assert [info.name for info in model.files] == [ONE, TWO]


def test_shards_without_an_index(tmp_path: Path, encoder) -> None:
    encoder.model(tmp_path / "m", SHARDS, index=False)
    encoder.model(tmp_path / "n", {"x.safetensors": {"a": [1]}, "y.safetensors": {"b": [1]}}, index=False)
    for name, tensors in (("m", ["a", "b", "c"]), ("n", ["a", "b"])):
        with open_folder(tmp_path / name, name=name) as model:
            assert list(model.tensors) == tensors


def test_an_index_over_one_file(tmp_path: Path, encoder) -> None:
    encoder.model(tmp_path / "m", {"model.safetensors": {"a": [2]}})
    with open_folder(tmp_path / "m", name="m") as model:
        assert list(model.tensors) == ["a"]


def test_metadata_of_all_shards(tmp_path: Path, encoder) -> None:
    for name, metadata in (("a", {"format": "pt"}), ("b", {"format": "np", "k": "v"})):
        (tmp_path / f"{name}.safetensors").write_bytes(encoder.file({"__metadata__": metadata}))
    with open_folder(tmp_path, name="m") as model:
        assert model.metadata == {"format": "pt", "k": "v"}


def test_a_relative_path_and_a_linked_folder(tmp_path: Path, encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder.model(tmp_path / "m", SHARDS)
    os.symlink("m", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    for path in ("m", "link"):
        with open_folder(Path(path), name="m") as model:
            assert len(model.tensors) == 3
            assert model.json("config.json")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist" in problem_of(tmp_path / "missing")
    os.symlink("nowhere", tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        assert "neither a folder nor a safetensors file" in problem_of(tmp_path / name)
    assert "no safetensors files" in problem_of(tmp_path)


@pytest.mark.parametrize(
    ("names", "fix"),
    [
        (["pytorch_model.bin"], "convert"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "convert"),
        (["consolidated.00.pth"], "convert"),
        (["model.gguf"], "convert"),
        (["tf_model.h5", "flax_model.msgpack"], "convert"),
        (["adapter_model.safetensors", "adapter_config.json"], "merge the adapter"),
    ],
)
def test_other_formats_are_named_with_the_way_out(tmp_path: Path, names: list[str], fix: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    text = problem_of(tmp_path)
    assert f"found {names[0]}" in text
    assert f"fix: {fix}" in text


def test_a_pickle_given_directly(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"PK\x03\x04")
    assert "fix: convert" in problem_of(tmp_path / "m.bin")


def test_single_file_and_index_must_not_contradict(tmp_path: Path, encoder) -> None:
    encoder.model(tmp_path / "m", SHARDS)
    encoder.write(tmp_path / "m" / "model.safetensors", {"a": [2], "b": [3], "c": [1]})
    assert "contradict each other" in problem_of(tmp_path / "m")
    (tmp_path / "m" / INDEX).unlink()
    assert "nothing says which of them is the model" in problem_of(tmp_path / "m")


def test_stale_and_incomplete_sets(tmp_path: Path, encoder) -> None:
    encoder.model(tmp_path / "a", {ONE: {"a": [1]}}, index=False)
    assert "1 of 2 shards 'model' are there" in problem_of(tmp_path / "a")
    other = "model-00001-of-00001.safetensors"
    encoder.model(tmp_path / "b", {**SHARDS, other: {"z": [1]}}, index=False)
    assert "shards of several sets" in problem_of(tmp_path / "b")
    encoder.model(tmp_path / "c", {**SHARDS, "consolidated.safetensors": {"z": [1]}}, index=False)
    assert "several sets of safetensors files" in problem_of(tmp_path / "c")
    encoder.model(tmp_path / "d", SHARDS)
    encoder.write(tmp_path / "d" / other, {"z": [1]})
    assert f"does not list shards that are in the folder\n  org/m\n  {other}" in problem_of(tmp_path / "d")


def test_the_same_tensor_twice(tmp_path: Path, encoder) -> None:
    shards = {ONE: {"a": [1], "b": [1]}, TWO: {"b": [1]}}
    encoder.model(tmp_path / "m", shards, index=False)
    assert f"b: in {ONE} and {TWO}" in problem_of(tmp_path / "m")
    rewrite_index(tmp_path / "m", {"a": ONE, "b": ONE})
    encoder.write(tmp_path / "m" / TWO, {"b": [1], "c": [1]})
    rewrite_index(tmp_path / "m", {"a": ONE, "b": ONE, "c": TWO})
    text = "\n".join(problem.render() for problem in problems_of(tmp_path / "m"))
    assert "1 tensors are in more than one file" in text
    assert "are not listed for it" in text


NOT_PLAIN = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\b.safetensors", "x\0.safetensors"]
NOT_PLAIN += ["", "..", "pytorch_model.bin", "C:x.safetensors", "n" * 400 + ".safetensors"]


@pytest.mark.parametrize("file", [*NOT_PLAIN, None, 1, ["model.safetensors"]])
def test_names_in_the_index_are_plain(tmp_path: Path, encoder, file: object) -> None:
    encoder.write(tmp_path / "x.safetensors", {"a": [1]})
    (tmp_path / "m").mkdir()
    assert "not the name of a safetensors file" in problem_of(rewrite_index(tmp_path / "m", {"a": file}))


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 1])
def test_the_form_of_the_index(tmp_path: Path, weight_map: object) -> None:
    assert "non-empty weight_map" in problem_of(rewrite_index(tmp_path, weight_map))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "non-empty weight_map"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"[" * 200_000, "nested"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key 'a' twice in weight_map"),
    ],
)
def test_a_malformed_index(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / INDEX).write_bytes(content)
    assert message in problem_of(tmp_path)


def test_an_index_with_a_byte_order_mark(tmp_path: Path, encoder) -> None:
    encoder.model(tmp_path / "m", SHARDS)
    index = tmp_path / "m" / INDEX
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    open_folder(tmp_path / "m", name="m").close()


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(InputError, match="too large"):
        open_folder(tmp_path, name="m")


def test_links_must_stay_inside(tmp_path: Path, encoder) -> None:
    outside = encoder.write(tmp_path / "outside.safetensors", {"a": [1]})
    (tmp_path / "m").mkdir()
    os.symlink(outside, tmp_path / "m" / "model.safetensors")
    assert "leaves the model's folder" in problem_of(tmp_path / "m")
    (tmp_path / "n").mkdir()
    encoder.write(tmp_path / "n" / "x.safetensors", {"a": [1]})
    os.symlink("x.safetensors", tmp_path / "n" / "model.safetensors")
    open_folder(tmp_path / "n", name="m").close()
    os.symlink(tmp_path / "index", tmp_path / "n" / INDEX)
    (tmp_path / "index").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert "leaves the model's folder" in problem_of(tmp_path / "n")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "dangling", "device"])
def test_shards_that_are_no_files(tmp_path: Path, encoder, kind: str) -> None:
    path = encoder.model(tmp_path / "m", SHARDS) / TWO
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.symlink({"loop": TWO, "dangling": "nowhere", "device": "/dev/zero"}[kind], path)
    with pytest.raises(InputError):
        open_folder(tmp_path / "m", name="m")


def test_all_problems_at_once(tmp_path: Path, encoder) -> None:
    names = [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
    shards = {name: {f"{name[10]}.a": [1], f"{name[10]}.b": [1]} for name in names}
    folder = encoder.model(tmp_path / "m", shards)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / names[0]).unlink()  # missing
    os.truncate(folder / names[1], (folder / names[1]).stat().st_size - 1)  # cut off
    weight_map["9.extra"] = names[2]  # listed, nowhere
    weight_map["3.b"] = names[3]  # misplaced
    del weight_map["5.a"]  # omitted
    rewrite_index(folder, weight_map)
    with pytest.raises(ManyProblems) as caught:
        open_folder(folder, name="org/m")
    text = caught.value.render()
    assert len(caught.value.problems) == 6
    for said in (
        f"a weight file is missing\n  org/m: {names[0]}",
        f"cut off before the end of tensor '2.b'\n  org/m: {names[1]}",
        f"1 tensors that the index lists for {names[2]} are not in it\n  org/m\n  9.extra\n",
        f"1 tensors of {names[2]} are not listed for it in the index\n  org/m\n  3.b\n",
        f"1 tensors that the index lists for {names[3]} are not in it\n  org/m\n  3.b (it is in {names[2]})",
        f"1 tensors of {names[4]} are not listed for it in the index\n  org/m\n  5.a\n",
    ):
        assert said in text


# --- the hub cache --------------------------------------------------------------------------------------------------

COMMIT, OLDER = "a" * 40, "b" * 40
SHA256 = "0123456789abcdef" * 4


@pytest.fixture
def cache(tmp_path: Path, encoder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one complete snapshot, made as huggingface_hub makes it: links to blobs."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    repo = tmp_path / "home" / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "blobs", repo / "refs", repo / "refs" / "refs" / "pr"):
        folder.mkdir(parents=True)
    model = encoder.model(tmp_path / "made", SHARDS)
    for number, name in enumerate(sorted(os.listdir(model))):
        blob = SHA256 if name == ONE else f"{number:040x}"
        (repo / "blobs" / blob).write_bytes((model / name).read_bytes())
        os.symlink(f"../../blobs/{blob}", snapshot / name)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "refs" / "pr" / "1").write_text(COMMIT)
    return repo


@pytest.mark.parametrize("revision", [None, "main", COMMIT, "refs/pr/1"])
def test_a_cached_model_needs_no_network(cache: Path, revision: str | None) -> None:
    found = hub.resolve("org/name", revision)
    assert found == hub.HubFolder(cache / "snapshots" / COMMIT, "org/name", COMMIT)
    with open_folder(found.path, name="org/name") as model:
        assert list(model.tensors) == ["a", "b", "c"]
        assert [info.blob_sha256 for info in model.files] == [SHA256, None]
        assert model.json("config.json") == {"model_type": "llama"}
        assert model.files[0].path == cache / "blobs" / SHA256


def test_cache_links_may_not_leave_the_repository(cache: Path, encoder) -> None:
    config = cache / "snapshots" / COMMIT / "config.json"
    config.unlink()
    secret = cache.parent / "secret"
    secret.write_text("{}")
    os.symlink("../../../secret", config)
    model = open_folder(cache / "snapshots" / COMMIT, name="m")
    with model, pytest.raises(InputError, match="leaves the model's folder"):
        model.json("config.json")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", None])
def test_where_the_cache_is(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    below = {"HF_HOME": "x/hub", "XDG_CACHE_HOME": "x/huggingface/hub", None: "user/.cache/huggingface/hub"}
    place = tmp_path / below.get(variable, "x")
    place.parent.mkdir(parents=True, exist_ok=True)
    cache.parent.rename(place)
    if variable:
        monkeypatch.setenv(variable, "$HOME/../x" if variable == "HF_HUB_CACHE" else str(tmp_path / "x"))
    assert hub.cache_dir().resolve() == place
    assert hub.resolve("org/name", None).commit == COMMIT


@pytest.mark.parametrize("lost", ["config.json", TWO, INDEX, "tokenizer.json"])
def test_an_incomplete_snapshot_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    names = ["config.json", ONE, TWO, INDEX, "README.md", "onnx/model.onnx", "pytorch_model.bin"]
    listing = {"format_version": 1, "files": {name: {"size": 1} for name in [*names, lost]}}
    (cache / "trees").mkdir()
    (cache / "trees" / f"{COMMIT}.json").write_text(json.dumps(listing))
    if lost == "tokenizer.json":
        pass  # only the listing knows of it
    else:
        assert hub.resolve("org/name", None).commit == COMMIT
        (cache / "snapshots" / COMMIT / lost).resolve().unlink()  # a link that leads nowhere: a download cut short
    with pytest.raises(InputError, match=rf"missing: .*{lost}.*downloads are off"):
        hub.resolve("org/name", None, download=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set") as caught:
        hub.resolve("org/name", None)
    assert "hf download" in (caught.value.fix or "")


def test_what_the_cache_does_not_know(cache: Path) -> None:
    for repo, revision in (("org/name", OLDER), ("org/name", "v2"), ("org/other", None), ("gpt2", None)):
        with pytest.raises(InputError, match="not completely in the hub cache"):
            hub.resolve(repo, revision, download=False)


@pytest.mark.parametrize("repo", ["", "/", "a/b/c", "../x", "org/..", "org/na me", "org--x/y", "./x", "org/name\n"])
def test_names_that_are_no_repository(repo: str) -> None:
    with pytest.raises(InputError, match="not the name of a model"):
        hub.resolve(repo, None, download=False)


@pytest.mark.parametrize("revision", ["../../x", "/etc/passwd", "a\\b", "a/../b", "a\0b"])
def test_names_that_are_no_revision(cache: Path, revision: str) -> None:
    with pytest.raises(InputError, match="not a revision"):
        hub.resolve("org/name", revision)


def test_a_download_asks_for_all_that_a_merge_needs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(repo: str, **settings: object) -> str:
        asked.update(settings, repo=repo)
        return str(cache / "snapshots" / OLDER)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = hub.resolve("org/name", OLDER)
    assert (found.commit, asked["repo"], asked["revision"]) == (OLDER, "org/name", OLDER)
    assert asked["cache_dir"] == cache.parent
    wanted = [ONE, INDEX, "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt"]
    wanted += ["merges.txt", "vocab.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "README.md", "NOTICE"]
    unwanted = ["onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth", "pytorch_model.bin", "m.gguf"]
    unwanted += ["modeling_x.py", "consolidated.safetensors", "pytorch_model.bin.index.json", ".gitattributes"]
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(filter_repo_objects(wanted + unwanted, **patterns)) == wanted


def test_download_errors_in_plain_words(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    class Response:
        headers = MappingProxyType[str, str]({})
        request = None
        status_code = 404

    cases: list[tuple[Exception, str, int]] = [
        (errors.GatedRepoError("x", response=Response()), "gated.*hf auth login", 3),
        (errors.RepositoryNotFoundError("x", response=Response()), "no such model on the hub", 3),
        (errors.RevisionNotFoundError("x", response=Response()), "no revision 'v2'", 3),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached", 3),
        (errors.OfflineModeIsEnabled("x"), "cannot be reached", 3),
        (RuntimeError("odd\nmore"), "the download failed: odd; org/name@v2", 3),
        (OSError(28, "No space left on device", "/c/f"), "cannot be stored: No space left", 4),
    ]
    for error, message, code in cases:

        def download(*_: object, error: Exception = error, **__: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(SmeltError, match=message) as caught:
            hub.resolve("org/name", "v2")
        assert caught.value.exit_code == code
