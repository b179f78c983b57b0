"""Handmade models and command-line runs: what the end-to-end tests are built of.

A model is a dict of NumPy arrays and a config; `model` writes them as a folder, `stored` reads any folder back, both
without smelt's own storage. `opened` gives the same as models that are open for planning.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden" / "data"
INDEX = "model.safetensors.index.json"
Array = NDArray[Any]

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_TYPES = {code: np.dtype(getattr(ml_dtypes, name, name)) for name, code in _CODES.items()}


# --- models ---------------------------------------------------------------------------------------------------------


def file(tensors: Mapping[str, Array], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file, byte by byte."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, value in tensors.items():
        end = position + value.nbytes
        header[name] = {
            "dtype": _CODES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    return struct.pack("<Q", len(text)) + text + data


def model(
    folder: Path,
    tensors: Mapping[str, Array],
    config: Mapping[str, Any] | None = None,
    *,
    shards: int = 1,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """A model folder: weights in `shards` files, config.json unless it is None, and other small `files`."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(file(tensors, metadata={"format": "pt"}))
    else:
        names = list(tensors)
        weight_map = {}
        for shard in range(shards):
            part = {name: tensors[name] for name in names[shard::shards]}
            target = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            (folder / target).write_bytes(file(part, metadata={"format": "pt"}))
            weight_map.update(dict.fromkeys(part, target))
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def llama(
    *,
    layers: int = 2,
    hidden: int = 8,
    vocabulary: int = 16,
    seed: int = 0,
    dtype: Any = np.float32,
    tied: bool = False,
) -> dict[str, Array]:
    """Tensors named as a llama's are, random; the same arguments give the same numbers."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{at}.mlp.up_proj.weight"] = (hidden + 4, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return {name: random.standard_normal(shape, dtype=np.float32).astype(dtype) for name, shape in shapes.items()}


def config(
    *, layers: int = 2, hidden: int = 8, vocabulary: int = 16, tied: bool = False, dtype: str = "float32", **more: Any
) -> dict[str, Any]:
    """The config.json that fits `llama` of the same numbers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        **more,
    }


def llamas(folder: Path, count: int = 2, **shape: Any) -> list[Path]:
    """`count` sound models of the same shapes: folder/m0, folder/m1, ..."""
    known = {key: value for key, value in shape.items() if key in ("layers", "hidden", "vocabulary", "tied")}
    return [model(folder / f"m{i}", llama(seed=i, **shape), config(**known)) for i in range(count)]


def stored(folder: Path) -> dict[str, Array]:
    """All tensors of a folder's safetensors files, as NumPy arrays."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            data = np.frombuffer(raw[8 + length + begin : 8 + length + end], dtype=_TYPES[entry["dtype"]])
            assert name not in found
            found[name] = data.reshape(entry["shape"])
    return found


def hub_model(
    home: Path, repo: str, source: Path, *, commit: str, refs: Iterable[str] = ("main",), hashed: bool = True
) -> Path:
    """Put a model folder into a hub cache under HF_HOME `home`, as its library does; gives the snapshot."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        content = path.read_bytes()
        large = path.suffix == ".safetensors" and hashed
        blob = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        (root / "blobs" / blob).write_bytes(content)
        os.symlink(f"../../blobs/{blob}", snapshot / path.name)
    for reference in refs:
        (root / "refs" / reference).write_text(commit)
    return snapshot


def opened(**models: tuple[Mapping[str, Array], Mapping[str, Any] | None]) -> dict[str, Any]:
    """Models (name -> tensors and config) as `smelt.planning.locate.open_models` gives them, in memory."""
    from smelt.dtypes import BY_CODE
    from smelt.planning.anatomy import anatomy
    from smelt.planning.entries import PlannedModel
    from smelt.planning.locate import Model
    from smelt.specs import ModelRef, TensorSpec
    from smelt.storage.sources.memory import MemoryCheckpoint

    found = {}
    for name, (tensors, settings) in models.items():
        stored = {}
        for key, value in tensors.items():
            spec = TensorSpec(key, BY_CODE[_CODES[value.dtype.name]], value.shape)
            stored[key] = (spec, np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        source = MemoryCheckpoint(name, stored)
        planned = PlannedModel(ModelRef(name, name), name, "memory")
        raw = None if settings is None else dict(settings)
        found[name] = Model(planned, source, raw, anatomy(source.tensors, raw))
    return found


# --- recipes and runs -----------------------------------------------------------------------------------------------


def linear(*models: Path | str, **keys: Any) -> dict[str, Any]:
    """A linear recipe of equal weights, as a tree; `keys` are further keys of the recipe."""
    tree = {"merge_method": "linear", "models": [{"model": str(path)} for path in models], "parameters": {"weight": 1}}
    return tree | keys


def recipe(path: Path, tree: Mapping[str, Any] | str) -> Path:
    """Write a recipe (JSON is YAML)."""
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree, indent=1))
    return path


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def smelt(*words: object, **environment: str) -> Done:
    """Run a command in this process, offline, as the command line would."""
    from smelt.cli.main import run

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", **environment}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run([str(word) for word in words])
    return Done(code, out.getvalue(), err.getvalue())


def command(*words: object) -> list[str]:
    """The words that start a command in a process of its own."""
    return [sys.executable, "-m", "smelt", *(str(word) for word in words)]


def process(
    *words: object, cwd: Path | None = None, umask: int = -1, encoding: str = "utf-8", **environment: str
) -> Done:
    """Run a command in a process of its own, offline; `encoding` is that of its output."""
    done = subprocess.run(
        command(*words),
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": encoding, **environment},
        capture_output=True,
        umask=umask,
        timeout=120,
    )
    return Done(done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding))


USAGE, INPUT, STORAGE, NUMERIC = 2, 3, 4, 5
"""Exit codes."""


def refused(
    folder: Path, tree: Any, *words: object, code: int, says: list[str], out: str = "out", problems: int = 1
) -> str:
    """Demand that a merge is refused with `code`, saying all of `says`, and that the disk is as it was."""
    path = recipe(folder / "recipe.yml", tree)
    before = snapshot(folder)
    done = smelt("merge", path, folder / out, *words)
    assert done.code == code, done.text
    assert snapshot(folder) == before
    assert "Traceback" not in done.text
    assert "defect" not in done.text
    for said in says:
        assert said in done.err, f"{said!r} is not in:\n{done.err}"
    assert done.err.count("error: ") == problems, done.err
    if problems > 1:
        assert f"{problems} problems" in done.err
    told = smelt("merge", path, folder / out, *words, "--json").json
    assert (told["ok"], told["exit_code"], len(told["problems"])) == (False, code, problems)
    assert all(problem["message"] and isinstance(problem["where"], list) for problem in told["problems"])
    return done.err


def accepted(folder: Path, tree: Any, *words: object, out: str = "out") -> Done:
    done = smelt("merge", recipe(folder / "recipe.yml", tree), folder / out, *words)
    assert done.code == 0, done.text
    return done


# --- what is on the disk --------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below `folder`, hidden ones too, with what is there: a digest, a link's target, or `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "other"
    return found


def copy(source: Path, target: Path) -> Path:
    """A copy of a model folder."""
    shutil.copytree(source, target)
    return target
