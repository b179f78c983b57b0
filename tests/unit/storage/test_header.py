"""`storage.header`: what is accepted is what safetensors accepts, with the same meaning; what is refused says why."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt import dtypes
from smelt.errors import InputError
from smelt.specs import TensorSpec
from smelt.storage import files, header, strict_json

TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

STRICTER_THAN_SAFETENSORS: dict[str, tuple[bytes, int]] = {
    # the library takes the last of two; which one is meant is anybody's guess
    "duplicate tensor": (b'{"a":%(two)s,"a":%(two)s}', 8),
    "white space first": (b' {"a":%(two)s}', 8),
    "metadata null": (b'{"a":%(two)s,"__metadata__":null}', 8),
    "duplicate metadata key": (b'{"a":%(two)s,"__metadata__":{"k":"1","k":"2"}}', 8),
    "unknown field": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}', 8),
    "entry as a list": (b'{"a":["F32",[2],[0,8]]}', 8),
    # no 64-bit signed count can hold it, though the zero before it makes the tensor empty
    "length of 2^63 behind a zero": (b'{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}', 0),
    "dtype as an object": (b'{"a":{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}}', 8),
}
"""All that the safetensors library accepts and smelt refuses."""


def plain(text: bytes) -> bytes:
    return text.replace(b"%(two)s", json.dumps(TWO).encode())


def parse(tree: object, data_bytes: int = 8) -> header.Header:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return header.parse(text, data_bytes=data_bytes, file="model.safetensors")


def oracle(text: bytes, data_bytes: int) -> dict[str, Any] | None:
    """What the safetensors library makes of a header: name -> (dtype, shape, bytes), or None when it refuses."""
    data = bytes(number % 251 for number in range(data_bytes))
    try:
        found = safetensors.deserialize(struct.pack("<Q", len(text)) + text + data)
    except Exception:
        return None
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def ours(text: bytes, data_bytes: int) -> dict[str, Any] | None:
    """The same by smelt."""
    data = bytes(number % 251 for number in range(data_bytes))
    try:
        parsed = header.parse(text, data_bytes=data_bytes, file="f")
    except InputError:
        return None
    whole = struct.pack("<Q", len(text)) + text + data
    return {
        name: (spec.dtype.code, spec.shape, whole[spec.offset : spec.offset + spec.nbytes])
        for name, spec in parsed.tensors.items()
    }


# --- agreement with the library -------------------------------------------------------------------------------------

NUMPY = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
names = st.text(max_size=12).filter(lambda name: name != "__metadata__")
arrays = st.builds(
    lambda shape, kind: np.zeros(shape, kind),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(NUMPY),
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(names, arrays, max_size=6), st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4))
)
def test_what_the_library_writes_we_read_identically(
    tensors: dict[str, np.ndarray], metadata: dict[str, str] | None
) -> None:
    whole = safetensors.numpy.save(tensors, metadata)
    (length,) = struct.unpack("<Q", whole[:8])
    text = whole[8 : 8 + length]
    assert ours(text, len(whole) - 8 - length) == oracle(text, len(whole) - 8 - length)
    if not tensors and metadata == {}:
        return  # safetensors 0.8 writes `{},"__metadata__":{}}` then, which nobody can read
    parsed = header.parse(text, data_bytes=len(whole) - 8 - length, file="f")
    assert parsed.metadata == (metadata or {})
    assert parsed.tensors.keys() == tensors.keys()


specs = st.builds(
    lambda name, dtype, shape: TensorSpec(name, dtype, tuple(shape)),
    names,
    st.sampled_from(sorted(dtypes.BY_CODE.values(), key=str)),
    st.lists(st.sampled_from([0, 1, 4, 8]), max_size=3).map(lambda shape: [*shape, 4]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(specs, max_size=6, unique_by=lambda spec: spec.name), st.dictionaries(st.text(max_size=4), st.text()))
def test_what_we_build_the_library_reads_identically(tensors: list[TensorSpec], metadata: dict[str, str]) -> None:
    built = header.build(tensors, metadata)
    assert len(built) % 8 == 0
    total = sum(spec.nbytes for spec in tensors)
    parsed = header.parse(built[8:], data_bytes=total, file="f")
    assert oracle(built[8:], total) == ours(built[8:], total)
    assert [(s.name, s.dtype, s.shape) for s in parsed.tensors.values() if s.nbytes] == [
        (s.name, s.dtype, s.shape) for s in tensors if s.nbytes
    ]
    assert parsed.metadata == metadata


SEED = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
        "c": {"dtype": "F4", "shape": [2, 1], "data_offsets": [11, 12]},
    }
).encode()
TOKENS = [b"0", b"-0", b"1", b"8", b"1e0", b"1.0", b"01", b"-1", b"true", b"null", b"NaN", b'""', b"[]", b"{}"]
TOKENS += [
    b'"F16"',
    b'"a"',
    b'"\\u0061"',
    b'"\\ud800"',
    b'"shape"',
    b" ",
    b"\n",
    b"\0",
    b"\xff",
    b",",
    b":",
    b"[",
    b"]",
]
TOKENS += [b"9223372036854775808", b"18446744073709551616", b"{", b"}", b'"', b"\\"]
TOKENS += [b'"b":{"dtype":"U8","shape":[0],"data_offsets":[8,8]},']
edits = st.lists(
    st.tuples(st.integers(0, len(SEED)), st.integers(0, 6), st.sampled_from(TOKENS) | st.binary(max_size=2)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=1500, deadline=None)
@given(edits, st.sampled_from([12, 12, 12, 11, 13, 0]))
def test_of_a_mutated_header_we_accept_only_what_the_library_accepts(
    changes: list[tuple[int, int, bytes]], data_bytes: int
) -> None:
    text = SEED
    for place, removed, inserted in changes:
        text = text[:place] + inserted + text[place + removed :]
    mine = ours(text, data_bytes)
    if mine is not None:
        assert mine == oracle(text, data_bytes)


entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F4", "U9", "", None, 1]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 2**31, 2**62, 2**64, -1, 1.0, True]), max_size=3),
        "data_offsets": st.lists(st.sampled_from([0, 1, 2, 4, 8, -1, 2**63, 2.0, False]), max_size=3),
    }
)


@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), entry, max_size=3), st.sampled_from([0, 1, 2, 4, 8]))
def test_of_invented_headers_we_and_the_library_accept_the_same(tree: dict[str, Any], data_bytes: int) -> None:
    text = json.dumps(tree).encode()
    assert ours(text, data_bytes) == oracle(text, data_bytes)


@pytest.mark.parametrize("case", STRICTER_THAN_SAFETENSORS)
def test_where_we_are_stricter(case: str) -> None:
    text, data_bytes = STRICTER_THAN_SAFETENSORS[case]
    assert oracle(plain(text), data_bytes) is not None
    with pytest.raises(InputError):
        parse(plain(text), data_bytes)


# --- refusals in plain words ----------------------------------------------------------------------------------------


def entry_of(**changes: object) -> dict[str, object]:
    return {"w": {**TWO, **changes}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (b"", "does not start with"),
        (b"[]", "does not start with"),
        (b"\xef\xbb\xbf{}", "does not start with"),
        (b"{", "not valid JSON"),
        (b'{"w":1}{', "not valid JSON"),
        (b'{"\xff":1}', "not UTF-8 text .byte 2"),
        (b'{"\\ud800":1}', "not valid Unicode"),
        (b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested 200001 deep"),
        (b'{"w":' + b"1" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"w":NaN}', "NaN is not a JSON number"),
        (b'{"w":[-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"w":{"shape":1,"shape":2}}', "key 'shape' twice in w"),
        (b'{"w":1,"v":1,"w":2}', "key 'w' twice"),
        ({"__metadata__": {"a": 1}}, "must map strings to strings"),
        ({"__metadata__": []}, "must map strings to strings"),
        ({"w": 1}, "tensor 'w' has a bad header entry.*it is 1"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "it has .'dtype', 'shape'."),
        ({"w": {**TWO, "more": 1}}, "'more'"),
        (entry_of(dtype="F33"), "unknown dtype 'F33'"),
        (entry_of(dtype=None), "unknown dtype None"),
        (entry_of(dtype=["F32"]), "unknown dtype"),
        (entry_of(shape=[True, 2]), "shape must be a list of integers"),
        (entry_of(shape=[2.0]), "shape must be a list of integers"),
        (entry_of(shape=[-2]), "shape must be a list of integers"),
        (entry_of(shape=2), "shape must be a list of integers"),
        (entry_of(shape="2"), "shape must be a list of integers"),
        (entry_of(shape=[2**62, 2**62, 0]), "more elements than can be counted"),
        (entry_of(shape=[2**63]), "more elements than can be counted"),
        (entry_of(data_offsets=[8, 0]), "begin <= end"),
        (entry_of(data_offsets=[0.0, 8]), "begin <= end"),
        (entry_of(data_offsets=[-8, 0]), "begin <= end"),
        (entry_of(data_offsets=[0]), "begin <= end"),
        (entry_of(data_offsets=[0, 4, 8]), "begin <= end"),
        (entry_of(shape=[3]), "need 12 bytes, data_offsets give 8"),
        (entry_of(dtype="F4", shape=[15]), "15 elements of F4 do not fill whole bytes"),
        ({"w": TWO, "v": TWO}, "tensor 'v' overlaps the tensor before it.*tensor 'w' ends at byte 8"),
        ({"w": {**TWO, "data_offsets": [8, 16]}}, "tensor 'w' has a hole before it"),
    ],
)
def test_every_way_to_be_malformed(tree: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(tree)
    assert caught.value.where[0] == "model.safetensors"
    assert len(caught.value.render()) < 1000


def test_the_data_must_be_covered_exactly() -> None:
    with pytest.raises(InputError, match=r"cut off before the end of tensor 'w'.*describes 8 bytes of data.* has 7"):
        parse({"w": TWO}, 7)
    with pytest.raises(InputError, match="bytes after its last tensor"):
        parse({"w": TWO}, 9)


def test_a_huge_value_does_not_fill_the_screen() -> None:
    with pytest.raises(InputError) as caught:
        parse({"w" * 10**6: {**TWO, "shape": [-1] * 10**5}})
    assert len(caught.value.render()) < 1000


def test_specs_digest_and_order(tmp_path, encoder) -> None:
    tree = {
        "later": {"dtype": "U8", "shape": [], "data_offsets": [8, 9]},
        "empty": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [8, 8]},
        "first": TWO,
    }
    path = tmp_path / "f"
    path.write_bytes(encoder.file(tree, bytes(9)))
    with files.open_read(path) as file:
        parsed = header.read(file, "shard")
    start = path.stat().st_size - 9
    assert list(parsed.tensors) == ["first", "empty", "later"]
    assert parsed.tensors["later"] == TensorSpec("later", dtypes.BY_CODE["U8"], (), "shard", start + 8)
    assert parsed.tensors["empty"].size == 0
    import xxhash

    assert parsed.digest == xxhash.xxh3_128(path.read_bytes()[:start]).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "only 0 bytes"),
        (b"1234567", "only 7 bytes"),
        (bytes(8), "header length is zero"),
        (bytes(100), "header length is zero"),
        (struct.pack("<Q", 2**63) + b"{}", "impossible"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "impossible"),
        (struct.pack("<Q", 100_000_001) + b"{}", "impossible"),
        (struct.pack("<Q", 100_000_000) + b"{}", "cut off"),
        (struct.pack("<Q", 3) + b"{}", "cut off"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer.*git lfs pull"),
        (b"PK\x03\x04\0\0\0\0\0\0\0", "a pickle"),
        (b"<!DOCTYPE html>", "impossible"),
    ],
)
def test_the_length_is_checked_before_anything_is_allocated(tmp_path, content: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with files.open_read(tmp_path / "f") as file, pytest.raises(InputError, match=message) as caught:
        header.read(file, "f")
    assert caught.value.exit_code == 3


def test_names_may_hold_anything() -> None:
    odd = ["", "a/b", "../x", "tab\t", "nul\0", "ünï", "🔥", 'quote"', "back\\slash", "__metadata", "{[", " "]
    built = header.build([TensorSpec(name, dtypes.F16, (1,)) for name in odd], {"format": "pt"})
    assert list(header.parse(built[8:], data_bytes=2 * len(odd), file="f").tensors) == odd


@pytest.mark.parametrize("tensors", [["__metadata__"], ["a", "a"], ["\ud800"]])
def test_names_that_a_header_cannot_hold(tensors: list[str]) -> None:
    with pytest.raises(InputError):
        header.build([TensorSpec(name, dtypes.F16, (1,)) for name in tensors], {})


def test_an_empty_header() -> None:
    built = header.build([], {})
    assert oracle(built[8:], 0) == ours(built[8:], 0) == {}


def test_sixty_thousand_tensors() -> None:
    many = [TensorSpec(f"model.layers.{n // 100}.experts.{n % 100}.weight", dtypes.BF16, (8, 8)) for n in range(60_000)]
    built = header.build(many, {})
    parsed = header.parse(built[8:], data_bytes=60_000 * 128, file="f")
    assert len(parsed.tensors) == 60_000


# --- strict JSON ----------------------------------------------------------------------------------------------------


def depth_by_hand(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_by_hand, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_by_hand, value), default=0)
    return 0


trees = st.recursive(
    st.text(alphabet='[]{}"\\a', max_size=5) | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[]{}"\\a', max_size=3), inner),
)


@settings(deadline=None)
@given(trees)
def test_nesting_is_counted_outside_strings_only(tree: object) -> None:
    assert strict_json.nesting(json.dumps(tree).encode()) == depth_by_hand(tree)
    assert strict_json.parse(json.dumps(tree).encode(), where=[]) == tree


def test_a_key_twice_is_named_with_its_path() -> None:
    with pytest.raises(InputError, match=r"key 'k' twice in a\.1\.b"):
        strict_json.parse(b'{"a": [0, {"b": {"k": 1, "k": 1}}]}', where=[])
    with pytest.raises(InputError, match="key 'k' twice"):
        strict_json.parse(b'{"a": {"k": 1, "k": 1}, "a": 1}', where=[])
