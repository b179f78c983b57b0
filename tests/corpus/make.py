"""Writes the small files of the corpus: `python tests/corpus/make.py`. The files are kept, so that a change is seen.

A case is a folder of `accept` or `reject`: a model, or a recipe beside one, and `case.toml`, which says what must come
of it (see `test_corpus.py`). A case needs no line here: any folder with a `case.toml` is tested.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def entry(shape: list[int], begin: int, dtype: str = "F32") -> dict[str, Any]:
    """A header entry for a tensor of a type of whole bytes."""
    size = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I64": 8, "F64": 8, "BOOL": 1}[dtype]
    for length in shape:
        size *= length
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}


def file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file, byte by byte; `length` is the header length that it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


SOUND = file({"w": entry([2, 2], 0), "b": entry([2], 16)}, floats(1, 2, 3, 4, 5, 6))
A, B = file({"w": entry([2, 2], 0)}, floats(1, 2, 3, 4)), file({"b": entry([2], 0)}, floats(5, 6))
SHARDS = {ONE: A, TWO: B}


def index(**homes: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": homes}).encode()


def one(content: bytes) -> dict[str, bytes]:
    return {"model.safetensors": content}


def header(tree: object, data: bytes = floats(1, 2)) -> dict[str, bytes]:
    return one(file(tree, data))


def recipe(text: str | bytes) -> dict[str, bytes]:
    return {**one(SOUND), "recipe.yml": text if isinstance(text, bytes) else text.encode()}


W = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
LINEAR = "merge_method: linear\nmodels:\n- model: model\n"
BOTH = b"merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: sound}, {model: model}]\n"

Case = tuple[dict[str, bytes], int, str | list[str], dict[str, Any]]


def bad(files: dict[str, bytes], says: str | list[str], code: int = 3, **more: Any) -> Case:
    return files, code, says, more


REJECT: dict[str, Case] = {
    # 1: cut off, impossible lengths
    "01-cut-by-100-bytes": bad(one(file({"w": entry([50], 0)}, floats(*range(50)))[:-100]), "cut off before the end"),
    "01-cut-in-the-header": bad(one(SOUND[:30]), "the file is cut off: its header has"),
    "01-empty-file": bad(one(b""), "it has only 0 bytes"),
    "01-seven-bytes": bad(one(SOUND[:7]), "it has only 7 bytes"),
    "01-header-length-zero": bad(one(bytes(64)), "its header length is zero"),
    "01-header-length-2-63": bad(one(file({}, length=1 << 63)), "is impossible"),
    "01-header-length-all-ones": bad(one(file({}, length=(1 << 64) - 1)), "is impossible"),
    "01-header-beyond-the-file": bad(one(file({}, length=10_000)), "the file is cut off: its header has 10000 bytes"),
    "01-git-lfs-pointer": bad(
        one(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), "git-lfs pointer"
    ),
    "01-pickle-called-safetensors": bad(one(b"PK\x03\x04" + bytes(60)), "not a safetensors file but a pickle"),
    # 2: offsets and sizes
    "02-overlap": bad(header({"v": entry([2], 0), "w": entry([2], 4)}, bytes(12)), "tensor 'w' overlaps"),
    "02-same-bytes-twice": bad(header({"v": entry([2], 0), "w": entry([2], 0)}), "overlaps the tensor before it"),
    "02-hole": bad(header({"v": entry([1], 0), "w": entry([1], 8)}, bytes(12)), "tensor 'w' has a hole before it"),
    "02-hole-at-the-start": bad(header({"w": entry([1], 4)}), "tensor 'w' has a hole before it"),
    "02-trailing-bytes": bad(header({"w": entry([2], 0)}, bytes(9)), "bytes after its last tensor"),
    "02-negative-offset": bad(
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), ["tensor 'w'", "begin <= end"]
    ),
    "02-offsets-reversed": bad(
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}), ["tensor 'w'", "begin <= end"]
    ),
    "02-float-offsets": bad(
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}), ["tensor 'w'", "begin <= end"]
    ),
    "02-three-offsets": bad(
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}), ["tensor 'w'", "begin <= end"]
    ),
    "02-shape-times-dtype": bad(
        header({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "need 12 bytes, data_offsets give 8"
    ),
    "02-shape-overflows": bad(
        header({"w": {"dtype": "U8", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}}, b""),
        "more elements than can be counted",
    ),
    "02-shape-negative": bad(
        header({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}), "list of integers, zero or more"
    ),
    "02-shape-true": bad(
        header({"w": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}), "list of integers, zero or more"
    ),
    "02-unknown-dtype": bad(
        header({"w": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}), "unknown dtype 'F31'"
    ),
    "02-half-a-byte": bad(
        header({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"ab"), "do not fill whole bytes"
    ),
    "02-unknown-field": bad(header({"w": {**entry([2], 0), "stride": 1}}), "must have exactly dtype, shape and"),
    "02-metadata-number": bad(header({"__metadata__": {"a": 1}, "w": entry([2], 0)}), "must map strings to strings"),
    # 3: a key twice
    "03-tensor-twice": bad(header(f"{W},{W[1:]}}}".encode()), "JSON has the key 'w' twice"),
    "03-tensor-twice-escaped": bad(header((W + ',"\\u0077"' + W[4:] + "}").encode()), "JSON has the key 'w' twice"),
    "03-dtype-twice": bad(header((W[:-1] + ',"dtype":"F32"}}').encode()), "JSON has the key 'dtype' twice in w"),
    "03-metadata-key-twice": bad(
        header((W + ',"__metadata__":{"a":"1","a":"2"}}').encode()), "JSON has the key 'a' twice in __metadata__"
    ),
    # 4: paths
    "04-index-parent": bad({INDEX: index(w="../outside.safetensors")}, "is not the name of a safetensors file"),
    "04-index-absolute": bad({INDEX: index(w="/etc/outside.safetensors")}, "is not the name of a safetensors file"),
    "04-index-subfolder": bad({INDEX: index(w="sub/x.safetensors")}, "is not the name of a safetensors file"),
    "04-index-backslash": bad({INDEX: index(w="..\\x.safetensors")}, "is not the name of a safetensors file"),
    "04-index-drive": bad({INDEX: index(w="C:x.safetensors")}, "is not the name of a safetensors file"),
    "04-index-other-kind": bad({INDEX: index(w="config.json")}, "is not the name of a safetensors file"),
    "04-link-outside": bad(
        {}, "link that leaves the model's folder", links={"model.safetensors": "../sound.safetensors"}
    ),
    "04-link-absolute": bad({}, "link that leaves the model's folder", links={"model.safetensors": "/etc/passwd"}),
    "04-link-loop": bad({}, "a link that leads nowhere", links={"model.safetensors": "model.safetensors"}),
    "04-link-to-a-device": bad({}, "link that leaves the model's folder", links={"model.safetensors": "/dev/zero"}),
    "04-shard-is-a-folder": bad({INDEX: index(w=ONE, b=TWO), ONE: A}, "not a regular file but a folder", folders=[TWO]),
    "04-shard-is-a-pipe": bad({INDEX: index(w=ONE, b=TWO), ONE: A}, "not a regular file but a pipe", pipes=[TWO]),
    "04-config-outside": bad(one(SOUND), "link that leaves the model's folder", links={"config.json": "/etc/passwd"}),
    "04-config-is-a-pipe": bad(one(SOUND), "'config.json' is not a regular file", pipes=["config.json"]),
    # 5: numbers
    "05-too-large-for-float16": bad(
        {
            **header({"w": entry([2], 0)}, floats(3e38, 1)),
            "recipe.yml": b"merge_method: passthrough\nout_dtype: float16\nmodels: [{model: model}]\n",
        },
        ["tensor 'w' would get a NaN or infinity", "first at index [0]"],
        5,
    ),
    "05-overflow-of-a-sum": bad(
        {
            **header({"w": entry([2], 0)}, floats(3e38, 1)),
            "recipe.yml": b"merge_method: linear\n"
            b"models: [{model: model}]\nparameters: {weight: 2, normalize: false}\n",
        },
        "tensor 'w' would get a NaN or infinity",
        5,
    ),
    "05-weights-sum-to-0": bad(
        recipe(LINEAR + "  parameters: {weight: 1}\n- model: model\n  parameters: {weight: -1}\n"),
        "the weights sum to 0",
        2,
    ),
    "05-weight-nan": bad(recipe(LINEAR + "  parameters: {weight: .nan}\n"), [".nan is not a number", ":4:"], 2),
    # 6: tensors and files that do not meet
    "06-shard-missing": bad({INDEX: index(w=ONE, b=TWO), ONE: A}, [f"model: {TWO}", "a weight file is missing"]),
    "06-index-omits": bad({INDEX: index(w=ONE), ONE: SOUND}, [f"1 tensors of {ONE} are not listed", "  b\n"]),
    "06-index-misplaces": bad(
        {INDEX: index(w=TWO, b=ONE), **SHARDS}, [f"w (it is in {ONE})", "1 tensors that the index lists"]
    ),
    "06-index-invents": bad({INDEX: index(w=ONE, b=TWO, z=TWO), **SHARDS}, ["are not in it", "  z\n"]),
    "06-tensor-in-two-shards": bad({ONE: A, TWO: SOUND}, f"w: in {ONE} and {TWO}"),
    "06-shards-incomplete": bad({ONE: A}, "1 of 2 shards 'model' are there"),
    "06-shard-not-listed": bad({INDEX: index(w=ONE), **SHARDS}, "does not list shards that are in the folder"),
    "06-file-and-index-contradict": bad({INDEX: index(w=ONE, b=TWO), **SHARDS, **one(SOUND)}, "contradict each other"),
    "06-no-weights": bad({"config.json": b"{}"}, "no weight files"),
    "06-missing-in-one-model": bad({**one(A), "recipe.yml": BOTH}, "missing in model"),
    "06-extra-in-one-model": bad(
        {
            **one(file({"w": entry([2, 2], 0), "b": entry([2], 16), "z": entry([1], 24)}, floats(*range(7)))),
            "recipe.yml": BOTH,
        },
        "model has 1 tensor that sound lacks",
    ),
    # 13: indexes and configs as text
    "13-index-utf-16": bad({INDEX: index(w=ONE).decode().encode("utf-16"), ONE: A}, "not UTF-8"),
    "13-index-deep": bad({INDEX: b"[" * 3000, ONE: A}, "JSON is nested 201000 deep, at most 64", repeat={INDEX: 67}),
    "13-index-100-mb": bad({ONE: A}, "the file is too large", sizes={INDEX: 100_000_000}),
    "13-index-list": bad({INDEX: b"[]", ONE: A}, "non-empty weight_map"),
    "13-index-map-list": bad({INDEX: b'{"weight_map": ["w"]}', ONE: A}, "non-empty weight_map"),
    "13-index-file-number": bad({INDEX: b'{"weight_map": {"w": 1}}', ONE: A}, "is not the name of a safetensors file"),
    "13-index-key-twice": bad(
        {INDEX: f'{{"weight_map": {{"w": "{ONE}", "w": "{TWO}"}}}}'.encode(), **SHARDS}, "key 'w' twice in weight_map"
    ),
    "13-index-cut": bad({INDEX: index(w=ONE)[:-4], ONE: A}, "not valid JSON"),
    "13-config-latin-1": bad({**one(SOUND), "config.json": '{"a": "é"}'.encode("latin-1")}, "not UTF-8 text (byte 7)"),
    "13-config-deep": bad(
        {**one(SOUND), "config.json": b"[" * 3000}, "JSON is nested 201000 deep, at most 64", repeat={"config.json": 67}
    ),
    "13-config-100-mb": bad(one(SOUND), "the file is too large", sizes={"config.json": 100_000_000}),
    "13-config-list": bad({**one(SOUND), "config.json": b"[1]"}, "must hold a JSON object"),
    "13-config-key-twice": bad({**one(SOUND), "config.json": b'{"a": 1, "a": 2}'}, "key 'a' twice"),
    "13-config-long-number": bad(
        {**one(SOUND), "config.json": b'{"a": ' + b"1" * 500 + b"}"}, "a number of 500 digits"
    ),
    "13-config-half-a-pair": bad({**one(SOUND), "config.json": b'{"a": "\\ud800"}'}, "not valid Unicode"),
    # 14: recipes
    "14-key-twice": bad(recipe("merge_method: linear\nmerge_method: ties\n"), ["`merge_method`", "recipe.yml:2:1"], 2),
    "14-alias-bomb": bad(
        recipe(
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True))
        ),
        "recipe.yml",
        2,
    ),
    "14-python-tag": bad(recipe("merge_method: !!python/object/apply:os.system [id]\n"), "recipe.yml:1", 2),
    "14-tab": bad(recipe("merge_method: linear\nmodels:\n\t- model: model\n"), ["tab", "recipe.yml:3"], 2),
    "14-deep": bad(recipe("[" * 3000), "recipe.yml:1", 2),
    "14-10-mb": bad(one(SOUND), "recipe.yml", 2, sizes={"recipe.yml": 10_000_000}),
    "14-not-utf-8": bad(recipe(b"merge_method: \xff\n"), "recipe.yml", 2),
    "14-misspelt-key": bad(
        recipe("merge_method: passthrough\nmodels: [{modle: model}]\n"),
        ["`modle`", "did you mean `model`?", ":2:11"],
        2,
    ),
    "14-misspelt-method": bad(
        recipe("merge_method: pasthrough\nmodels: [{model: model}]\n"), ["did you mean `passthrough`?", ":1:15"], 2
    ),
    "14-unknown-parameter": bad(
        recipe(LINEAR + "  parameters: {weight: 1, density: 0.5}\n"), ["linear has no parameter `density`", ":4:"], 2
    ),
    "14-number-as-text": bad(recipe(LINEAR + "  parameters: {weight: 1,5}\n"), "recipe.yml:4", 2),
    "14-filter-that-fits-nothing": bad(
        recipe(LINEAR + "  parameters: {weight: [{filter: mlpp, value: 2}, {value: 1}]}\n"),
        ["--strict makes it an error", "filter 'mlpp' fits no tensor"],
        2,
        words=["--strict"],
    ),
    # 17: small files that lead elsewhere
    "17-tokenizer-link": bad(
        one(SOUND), "link that leaves the model's folder", links={"tokenizer.json": "../secret.txt"}
    ),
    "17-licence-link": bad(one(SOUND), "link that leaves the model's folder", links={"LICENSE": "../secret.txt"}),
    "17-tokenizer-link-loop": bad(
        {**one(SOUND), "tokenizer_config.json": b"{}"},
        "link that leaves the model's folder",
        links={"special_tokens_map.json": "../secret.txt"},
    ),
    "17-chat-template-with-a-path": bad(
        recipe("merge_method: passthrough\nmodels: [{model: model}]\nchat_template: ../../secret.txt\n"),
        "there is no chat template '../../secret.txt'",
        2,
    ),
    # 26: names
    "26-name-is-half-a-pair": bad(header(W.replace('"w"', '"\\ud800"').encode() + b"}"), "not valid Unicode"),
    "26-metadata-as-a-tensor": bad(header({"__metadata__": entry([2], 0)}), "must map strings to strings"),
}

ACCEPT: dict[str, dict[str, bytes]] = {
    "01-header-padded": one(file(json.dumps({"w": entry([2], 0)}).encode() + b" " * 41, floats(1, 2))),
    "02-entries-in-another-order": header({"b": entry([1], 4), "a": entry([1], 0)}),
    "02-unaligned": header({"a": entry([3], 0, "U8"), "w": entry([1], 3)}, bytes(3) + floats(1)),
    "03-names-that-differ-in-case": header({"w": entry([1], 0), "W": entry([1], 4)}),
    "04-link-inside": {"x.safetensors": SOUND, "case.links": b""},
    "05-inherited-nan": header({"w": entry([2], 0)}, floats(float("nan"), 1)),
    "06-shards-and-index": {INDEX: index(w=ONE, b=TWO), **SHARDS},
    "06-shards-without-index": dict(SHARDS),
    "06-one-file-and-its-index": {INDEX: index(w="model.safetensors", b="model.safetensors"), **one(SOUND)},
    "06-consolidated-beside": {INDEX: index(w=ONE, b=TWO), **SHARDS, "consolidated.safetensors": SOUND},
    "13-index-with-bom": {INDEX: b"\xef\xbb\xbf" + index(w=ONE, b=TWO), **SHARDS},
    "13-config-with-bom": {**one(SOUND), "config.json": b'\xef\xbb\xbf{"model_type": "x"}'},
    "13-config-nan-and-infinity": {**one(SOUND), "config.json": b'{"a": NaN, "b": [Infinity, -Infinity], "c": 1e999}'},
    "13-config-private-keys": {**one(SOUND), "config.json": b'{"_name_or_path": "/home/me", "a": 1}'},
    "14-recipe-with-bom-and-crlf": recipe(b"\xef\xbb\xbfmerge_method: passthrough\r\nmodels:\r\n- model: model\r\n"),
    "14-recipe-with-anchors": recipe("merge_method: passthrough\nmodels:\n- &m {model: model}\n"),
    "26-zero-size": header({"a": entry([0, 3], 0), "w": entry([2], 0)}),
    "26-only-zero-size": header({"a": entry([0], 0)}, b""),
    "26-0-d-and-1-element": header({"s": entry([], 0), "t": entry([1], 4)}),
    "26-odd-names": header(
        {
            name: entry([1], place, "U8")
            for place, name in enumerate(["a/b", "../x", " ", "", "ü", "🔥", "a\tb", "nul\0"])
        },
        bytes(8),
    ),
    "26-metadata-lookalikes": header({"__metadata__": {"format": "pt"}, "__metadata": entry([1], 0)}, floats(1)),
    "26-no-tensors": header({}, b""),
    "26-all-carried-types": header(
        {"i": entry([1], 0, "I64"), "f": entry([1], 8, "F64"), "u": entry([2], 16, "U8"), "t": entry([2], 18, "BOOL")},
        bytes(18) + b"\1\0",
    ),
}


def value(found: object) -> str:
    """A value as TOML writes it."""
    if isinstance(found, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {value(one)}" for key, one in found.items()) + " }"
    return json.dumps(found, ensure_ascii=False)


def write(folder: Path, files: dict[str, bytes], case: dict[str, object]) -> None:
    """One case."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "case.toml").write_text("".join(f"{key} = {value(found)}\n" for key, found in case.items()))


def main() -> None:
    """Write every case of the tables; others are left alone."""
    for name, (files, code, says, more) in REJECT.items():
        write(HERE / "reject" / name, files, {"code": code, "says": [says] if isinstance(says, str) else says, **more})
    for name, files in ACCEPT.items():
        links = {"links": {"model.safetensors": "x.safetensors"}} if files.pop("case.links", None) is not None else {}
        write(HERE / "accept" / name, files, links)


if __name__ == "__main__":
    main()
