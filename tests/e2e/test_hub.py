"""Models of the hub, against a small hub of our own on this machine: what is fetched, what is not, and what is refused.

`Hub` speaks as much of the hub's API as huggingface_hub needs, and counts every request and every byte that it serves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import factory
from factory import Done, config, linear, llama, model, process, recipe, stored
from smelt.errors import InputError, SmeltError
from smelt.preparing import prepare
from smelt.storage.sources import hub as hub_source
from smelt.storage.sources.local import open_folder
from smelt.storage.sources.remote import FIRST, RemoteCheckpoint, open_remote

SHAPE = {"layers": 4, "hidden": 96, "vocabulary": 512}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SINGLE = "model.safetensors"
VOCABULARY = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []})
SMALL = {"tokenizer.json": VOCABULARY, "LICENSE": "free", "README.md": "# m\n", "chat_template.jinja": "{{ messages }}"}
UNWANTED = {"modeling_x.py": "print('canary')", "pytorch_model.bin": b"PK\x03\x04"}


class Hub:
    """Repositories over HTTP on 127.0.0.1."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> file -> content
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.sizes: dict[str, int] = {}  # of a file, as the hub tells it, where it lies
        self.ignores_range = False
        self.body: Callable[[bytes], bytes] = lambda content: content  # what is really sent of a weight file
        self.failures = 0  # so many requests for weights are answered with 503
        self.requests: list[str] = []
        self.served: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo: str, folder: Path, *, refs: tuple[str, ...] = ("main",)) -> str:
        """Publish a model folder as a commit; gives the commit."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        files["onnx/model.onnx"] = b"another copy"
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.refs.setdefault(repo, {}).update(dict.fromkeys(refs, commit))
        return commit

    def forget(self) -> None:
        """Count from zero again."""
        self.requests.clear()
        self.served.clear()

    def stop(self) -> None:
        """Answer no more; a second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def weights(self) -> dict[str, int]:
        """Bytes served of each weight file."""
        return {name: count for name, count in self.served.items() if name.endswith(".safetensors")}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                with hub._lock:
                    hub.requests.append(f"{self.command} {path}")
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
                    self._api(found[1], found[2] or "revision", found[3] or "main")
                elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    self._file(found[1], found[2], found[3])
                else:
                    self._refuse(404, "EntryNotFound")

            def _commit(self, repo: str, revision: str) -> str | None:
                if repo not in hub.repos:
                    self._refuse(404, "RepoNotFound")
                    return None
                commit = hub.refs[repo].get(revision, revision)
                if commit not in hub.repos[repo]:
                    self._refuse(404, "RevisionNotFound")
                    return None
                return commit

            def _api(self, repo: str, what: str, revision: str) -> None:
                commit = self._commit(repo, revision)
                if commit is None:
                    return
                files = hub.repos[repo][commit]
                if what == "revision":
                    siblings = [self._row(name, content, "rfilename", "sha256") for name, content in files.items()]
                    if "blobs=true" not in self.path.lower():
                        siblings = [{"rfilename": row["rfilename"]} for row in siblings]
                    self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []})
                    return
                rows = [self._row(name, content, "path", "oid") for name, content in files.items()]
                if "recursive=true" not in self.path.lower():
                    rows = [row for row in rows if "/" not in row["path"]]
                    rows.append({"type": "directory", "path": "onnx", "oid": "0"})
                self._json(rows)

            def _row(self, name: str, content: bytes, path: str, digest: str) -> dict[str, Any]:
                size = hub.sizes.get(name, len(content))
                row = {"type": "file", path: name, "oid": hashlib.sha1(content).hexdigest(), "size": size}
                if name.endswith(".safetensors"):
                    row["lfs"] = {digest: hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
                return row

            def _file(self, repo: str, revision: str, name: str) -> None:
                commit = self._commit(repo, revision)
                if commit is None:
                    return
                if repo in hub.gated:
                    self._refuse(403, "GatedRepo")
                    return
                content = hub.repos[repo][commit].get(name)
                if content is None:
                    self._refuse(404, "EntryNotFound")
                    return
                weights = name.endswith(".safetensors")
                if weights and self.command == "GET" and hub.failures:
                    hub.failures -= 1
                    self._refuse(503, "Busy")
                    return
                total = hub.sizes.get(name, len(content))
                digest = hashlib.sha256(content) if weights else hashlib.sha1(content)
                headers = {"X-Repo-Commit": commit, "ETag": f'"{digest.hexdigest()}"', "Accept-Ranges": "bytes"}
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if wanted is None or hub.ignores_range:
                    self._send(200, content, headers, name)
                    return
                start, end = int(wanted[1]), min(int(wanted[2]), total - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{total}"
                piece = content[start : end + 1]
                self._send(206, hub.body(piece) if weights else piece, headers, name)

            def _json(self, tree: object) -> None:
                self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, "api")

            def _refuse(self, status: int, code: str) -> None:
                self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": "refused"}, "api")

            def _send(self, status: int, content: bytes, headers: dict[str, str], name: str) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    with hub._lock:
                        hub.served[name] += len(content)
                    with contextlib.suppress(ConnectionError):  # the reader may turn away from what it did not ask for
                        self.wfile.write(content)

        return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.stop()


@pytest.fixture
def home(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HF_HOME; the hub is the one above, for this process and for those that it starts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    home = tmp_path / "home"
    settings = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)  # of this process only
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    close_session()  # the connections of another test's hub
    return home


@pytest.fixture
def models(hub: Hub, tmp_path: Path) -> list[Path]:
    """org/one in two shards (branch main and tag v1) and org/two in one file: published, and as local folders."""
    folders = []
    for seed, (repo, shards) in enumerate((("org/one", 2), ("org/two", 1))):
        files = {**SMALL, **UNWANTED} if repo == "org/two" else SMALL
        folder = model(
            tmp_path / "local" / repo, llama(seed=seed, **SHAPE), config(**SHAPE), shards=shards, files=files
        )
        hub.add(repo, folder, refs=("main", "v1"))
        folders.append(folder)
    return folders


def run(*words: object, **environment: str) -> Done:
    """A command in a process of its own, online."""
    return process(*words, **{"HF_HUB_OFFLINE": "0", **environment})


def online(*words: object) -> Done:
    """A command in this process, online."""
    return factory.smelt(*words, HF_HUB_OFFLINE="0")


def header_bytes(content: bytes) -> int:
    return 8 + int(struct.unpack("<Q", content[:8])[0])


def assert_only_headers(hub: Hub, folders: list[Path]) -> None:
    """Every weight file was asked for, and of none was much more served than its header."""
    sizes = {path.name: path.read_bytes() for folder in folders for path in folder.glob("*.safetensors")}
    assert hub.weights().keys() == sizes.keys()
    for name, served in hub.weights().items():
        assert served <= max(header_bytes(sizes[name]), FIRST), name
        assert served < len(sizes[name]) / 10, name


# --- what is fetched ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "check"])
def test_headers_are_fetched_and_weights_are_not(
    command: str, hub: Hub, home: Path, models: list[Path], tmp_path: Path
) -> None:
    done = run(command, recipe(tmp_path / "r.yml", linear("org/one@v1", "org/two")), "--json")
    assert (done.code, done.err) == (0, ""), done.text  # no progress bars either
    assert_only_headers(hub, models)
    assert {name for name in hub.served if name in UNWANTED or "/" in name} == set()
    assert not list(home.rglob("*.safetensors"))
    assert {path.name for path in home.rglob("snapshots/*/*")} == {"config.json", factory.INDEX, *SMALL}
    tree = json.loads(done.out)
    here = json.loads(run(command, recipe(tmp_path / "l.yml", linear(*models)), "--json").out)
    if command == "plan":
        assert [(row["name"], row["shape"], row["dtype"]) for row in tree["tensors"]] == [
            (row["name"], row["shape"], row["dtype"]) for row in here["tensors"]
        ]
        assert [row["commit"] for row in tree["models"]] == [hub.refs[repo]["main"] for repo in ("org/one", "org/two")]
    else:
        assert tree == here


def test_a_merge_downloads_once(hub: Hub, home: Path, models: list[Path], tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.yml", linear("org/one@v1", "org/two"))
    assert run("plan", path).code == 0  # leaves a snapshot without weights, which must not be taken for the model
    hub.forget()
    done = run("merge", path, tmp_path / "out")
    assert done.code == 0, done.text
    sizes = {file.name: file.stat().st_size for folder in models for file in folder.glob("*.safetensors")}
    assert hub.weights() == sizes
    assert not {name for name in hub.served if name in UNWANTED or "/" in name}
    assert run("merge", recipe(tmp_path / "l.yml", linear(*models)), tmp_path / "here").code == 0
    hub_tensors, local_tensors = stored(tmp_path / "out"), stored(tmp_path / "here")
    assert hub_tensors.keys() == local_tensors.keys()
    assert all((hub_tensors[name] == local_tensors[name]).all() for name in hub_tensors)
    record = json.loads((tmp_path / "out" / "smelt.json").read_text())
    assert [row["commit"] for row in record["inputs"]] == [hub.refs[repo]["main"] for repo in ("org/one", "org/two")]
    recorded = {file["name"]: file["sha256"] for row in record["inputs"] for file in row["files"]}
    assert recorded == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in models
        for file in folder.glob("*.safetensors")
    }

    hub.forget()
    assert run("plan", path).code == 0
    assert run("merge", path, tmp_path / "again").code == 0
    assert hub.requests == []  # the cache holds all: the hub is not even asked whether the branch has moved
    hub.stop()
    (tmp_path / "offline").mkdir()
    assert run("merge", path, tmp_path / "offline" / "out", HF_HUB_OFFLINE="1").code == 0
    assert factory.snapshot(tmp_path / "offline" / "out") == factory.snapshot(tmp_path / "out")


def test_a_long_header_takes_a_second_request(hub: Hub, home: Path, tmp_path: Path) -> None:
    tensors = llama(layers=60, hidden=24, vocabulary=64)
    folder = model(tmp_path / "long", tensors, config(layers=60, hidden=24, vocabulary=64))
    hub.add("org/long", folder)
    content = (folder / SINGLE).read_bytes()
    assert header_bytes(content) > 2 * FIRST
    with open_remote(hub_source.resolve("org/long", None, weights=False), name="m") as remote:
        assert list(remote.tensors) == list(tensors)
    assert hub.weights() == {SINGLE: header_bytes(content)}
    assert len([line for line in hub.requests if line.endswith(SINGLE)]) == 2


def test_what_a_remote_checkpoint_tells(hub: Hub, home: Path, models: list[Path]) -> None:
    for repo, local in zip(("org/one", "org/two"), models, strict=True):
        found = hub_source.resolve(repo, "v1", weights=False)
        assert (found.complete, found.commit) == (False, hub.refs[repo]["v1"])
        with open_remote(found, name=repo) as remote, open_folder(local, name=repo) as here:
            assert remote.tensors == here.tensors
            assert list(remote.tensors) == list(here.tensors)
            assert remote.metadata == here.metadata
            assert [(info.name, info.size, info.header_digest) for info in remote.files] == [
                (info.name, info.size, info.header_digest) for info in here.files
            ]
            assert [info.blob_sha256 for info in remote.files] == [
                hashlib.sha256(info.path.read_bytes()).hexdigest() for info in here.files
            ]
            assert remote.json("config.json") == here.json("config.json")
            assert set(remote.other_files()) == set(here.other_files()) - UNWANTED.keys()
            assert (remote.commit, remote.changed()) == (found.commit, [])
            spec = next(iter(remote.tensors.values()))
            with pytest.raises(InputError, match="not downloaded") as caught:
                remote.read_into(spec, 0, 4, bytearray(4))
            assert repo in str(caught.value)


def test_a_model_that_is_in_the_cache_is_opened_there(hub: Hub, home: Path, models: list[Path], tmp_path: Path) -> None:
    commit = hub.refs["org/one"]["main"]
    factory.hub_model(home, "org/one", models[0], commit=commit, refs=("main",))
    with prepare(linear("org/one", "org/two"), weights=False) as prepared:
        one, two = prepared.models
        assert not isinstance(one.source, RemoteCheckpoint)
        assert isinstance(two.source, RemoteCheckpoint)
        assert one.planned.commit == commit
    assert not any("org/one" in line for line in hub.requests)
    # A branch that the cache knows at an older, incomplete commit: once it is known to have moved to one that is there
    (home / "hub" / "models--org--one" / "refs" / "main").unlink()
    assert hub_source.resolve("org/one", None, weights=False).complete


def test_two_names_of_one_commit_are_one_model(hub: Hub, home: Path, models: list[Path]) -> None:
    with prepare(linear("org/one", "org/one@v1"), weights=False) as prepared:
        assert len(prepared.models) == 1
    assert len([line for line in hub.requests if line.endswith(ONE)]) == 1


def test_a_busy_hub_is_asked_again(hub: Hub, home: Path, models: list[Path]) -> None:
    hub.failures = 1
    with open_remote(hub_source.resolve("org/two", None, weights=False), name="m") as remote:
        assert len(remote.tensors) == len(llama(**SHAPE))


# --- what cannot be fetched -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_what_the_hub_does_not_have(command: str, hub: Hub, home: Path, models: list[Path], tmp_path: Path) -> None:
    hub.add("org/gated", models[0])
    hub.gated.add("org/gated")
    cases = {
        "org/none": "there is no such model on the hub, or it is private",
        "org/one@v2": "the model has no revision 'v2'",
        "org/gated": "the model is gated: its owner must grant access",
    }
    out = [tmp_path / "out"] if command == "merge" else []
    for name, said in cases.items():
        done = online(command, recipe(tmp_path / "r.yml", linear(name, "org/two")), *out)
        assert done.code == 3, done.text
        assert done.err.startswith(f"error: {said}\n  {tmp_path / 'r.yml'}:"), done.err
        assert f"\n  {name}\n" in done.err
        assert done.err.count("error:") == 1
        assert "Traceback" not in done.text
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_no_connection(command: str, hub: Hub, home: Path, models: list[Path], tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.yml", linear("org/one", models[1]))
    out = [tmp_path / "out"] if command == "merge" else []
    done = run(command, path, *out, HF_HUB_OFFLINE="1")
    assert (done.code, hub.requests) == (3, []), done.text
    assert done.err.startswith("error: the model is not completely in the hub cache, and HF_HUB_OFFLINE is set\n")
    elsewhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody answers there
    for _ in range(2):
        done = run(command, path, *out, **elsewhere)
        assert done.code == 3, done.text
        assert done.err.startswith("error: the hub cannot be reached, and the model is not completely in the cache\n")
        assert done.err.count("error:") == 1
        assert run("plan", path).code == 0  # now the small files are in the cache, which is not enough either
    assert not (tmp_path / "out").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


def entry(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}


def weights(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


SOUND = weights({"a": entry(0, 4, [4]), "b": entry(4, 6, [2])}, b"123456")
BROKEN = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length zero": struct.pack("<Q", 0) + b"{}",
    "length beyond the file": struct.pack("<Q", 90_000_000) + SOUND[8:],
    "an impossible length": struct.pack("<Q", 1 << 63) + SOUND[8:],
    "cut off": SOUND[:-1],
    "cut off in the header": SOUND[:40],
    "trailing bytes": SOUND + b"7",
    "a hole": weights({"a": entry(0, 4, [4]), "b": entry(5, 6, [1])}, b"123456"),
    "an overlap": weights({"a": entry(0, 4, [4]), "b": entry(3, 6, [3])}, b"123456"),
    "a name twice": weights(b'{"a": {}, "a": {}}', b""),
    "a shape that lies": weights({"a": entry(0, 6, [7])}, b"123456"),
    "not JSON": weights(b"{nonsense", b""),
    "a pickle": b"PK\x03\x04" + bytes(100),
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_headers_are_checked_as_those_of_local_files(content: bytes, hub: Hub, home: Path, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {}, config())
    (folder / SINGLE).write_bytes(content)
    hub.add("org/m", folder)
    assert_refused_alike(folder)


def assert_refused_alike(folder: Path) -> None:
    """The published copy org/m of `folder` is refused with the same words as the folder itself."""
    texts = []
    for source in (
        lambda: open_folder(folder, name="org/m"),
        lambda: open_remote(hub_source.resolve("org/m", None, weights=False), name="org/m"),
    ):
        with pytest.raises(SmeltError) as caught:
            source()
        assert caught.value.exit_code == 3
        texts.append([(problem.message, problem.where, problem.fix) for problem in caught.value.problems])
    assert texts[0] == texts[1]


FOLDERS: dict[str, dict[str, Any]] = {
    "a shard is missing": {"lose": [TWO]},
    "a shard is missing, and there is no index": {"lose": [TWO, factory.INDEX]},
    "the index lists a tensor elsewhere": {"map": {"model.norm.weight": ONE}},
    "the index lists what is nowhere": {"map": {"nonsense": ONE}},
    "the index leaves the folder": {"map": {"nonsense": "../x.safetensors"}},
    "a shard that the index does not list": {"add": {"model-00001-of-00001.safetensors": SOUND}},
    "index and single file": {"add": {SINGLE: SOUND}},
    "shards and single file": {"add": {SINGLE: SOUND}, "lose": [factory.INDEX]},
    "the index is no JSON": {"add": {factory.INDEX: b"[" * 100_000}},
    "only an adapter": {"lose": [ONE, TWO, factory.INDEX], "add": {"adapter_model.safetensors": SOUND}},
    "only a pickle": {"lose": [ONE, TWO, factory.INDEX], "add": {"pytorch_model.bin": b"PK\x03\x04"}},
    "two files are broken": {"add": {ONE: SOUND[:-1], TWO: b""}},
}


@pytest.mark.parametrize("change", FOLDERS.values(), ids=FOLDERS)
def test_indexes_are_checked_as_those_of_local_folders(
    change: dict[str, Any], hub: Hub, home: Path, tmp_path: Path
) -> None:
    folder = model(tmp_path / "m", llama(), config(), shards=2)
    if "map" in change:
        tree = json.loads((folder / factory.INDEX).read_text())
        tree["weight_map"] |= change["map"]
        (folder / factory.INDEX).write_text(json.dumps(tree))
    for name in change.get("lose", []):
        (folder / name).unlink()
    for name, content in change.get("add", {}).items():
        (folder / name).write_bytes(content)
    hub.add("org/m", folder)
    assert_refused_alike(folder)


def problem(hub: Hub) -> SmeltError:
    with pytest.raises(InputError) as caught:
        open_remote(hub_source.resolve("org/two", None, weights=False), name="org/two")
    return caught.value


@pytest.mark.parametrize("length", [100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_huge_header_is_not_fetched(length: int, hub: Hub, home: Path, models: list[Path]) -> None:
    (commit,) = hub.repos["org/two"]
    files = hub.repos["org/two"][commit]
    files[SINGLE] = struct.pack("<Q", length) + files[SINGLE][8:]
    hub.sizes[SINGLE] = 1 << 50
    found = problem(hub)
    assert "is impossible (at most 100000000)" in found.message
    assert found.where[0] == f"org/two: {SINGLE}"
    assert hub.weights() == {SINGLE: FIRST}


LIES: dict[str, dict[str, Any]] = {
    "the range is ignored": {"ignores_range": True},
    "fewer bytes than stated": {"body": lambda content: content[:-1]},
    "more bytes than stated": {"body": lambda content: content + b"x"},
    "no bytes": {"body": lambda content: b""},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_hub_that_lies_about_ranges(lie: dict[str, Any], hub: Hub, home: Path, models: list[Path]) -> None:
    for name, value in lie.items():
        setattr(hub, name, value)
    found = problem(hub)
    assert found.message == "the hub does not send the part of the file that was asked for"
    assert found.where[0] == f"org/two: {SINGLE}"


@pytest.mark.parametrize("difference", [-1000, 1000])
def test_a_size_that_lies(difference: int, hub: Hub, home: Path, models: list[Path]) -> None:
    hub.sizes[SINGLE] = (models[1] / SINGLE).stat().st_size + difference
    assert ("cut off" if difference < 0 else "bytes after its last tensor") in problem(hub).message


def test_an_error_names_the_model_of_the_recipe(hub: Hub, home: Path, models: list[Path], tmp_path: Path) -> None:
    (commit,) = hub.repos["org/two"]
    hub.repos["org/two"][commit][SINGLE] = SOUND[:-1]
    done = online("plan", recipe(tmp_path / "r.yml", linear("org/one", "org/two")))
    assert done.code == 3
    assert done.err.startswith("error: the file is cut off before the end of tensor 'b'\n")
    assert f"\n  org/two: {SINGLE}\n" in done.err


def test_small_files_are_not_looked_for_outside(hub: Hub, home: Path, models: list[Path]) -> None:
    with ExitStack() as stack:
        remote = stack.enter_context(open_remote(hub_source.resolve("org/two", None, weights=False), name="org/two"))
        assert remote.bytes("modeling_x.py") is None
        with pytest.raises(InputError, match="not a plain file name"):
            remote.bytes("../../../../token")
