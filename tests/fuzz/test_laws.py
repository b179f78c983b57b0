"""The laws of `laws.py` on inputs that hypothesis makes, on the seeds, and on what fuzzing once found."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import grammar, seeds
from fuzz.laws import (
    FOLDER,
    ONE,
    OTHER,
    STRICTER_HEADERS,
    STRICTER_INDEXES,
    TWO,
    Broken,
    file_law,
    header_law,
    index_law,
)
from smelt.errors import InputError
from smelt.storage import header
from smelt.storage.sources import shards

pieces = st.lists(st.sampled_from(seeds.WORDS) | st.binary(max_size=3), max_size=40).map(b"".join)


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=120))
def test_headers_by_the_grammar(choices: bytes) -> None:
    header_law(*grammar.header(choices))


@settings(max_examples=500, deadline=None)
@given(pieces, st.integers(0, 20))
def test_headers_of_words(text: bytes, data_bytes: int) -> None:
    header_law(b"{" + text, data_bytes)


@settings(max_examples=500, deadline=None)
@given(
    st.binary(max_size=40) | st.tuples(st.integers(0, 2**64 - 1), pieces).map(lambda p: struct.pack("<Q", p[0]) + p[1])
)
def test_files(data: bytes) -> None:
    file_law(data)


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=80))
def test_indexes_by_the_grammar(choices: bytes) -> None:
    index_law(grammar.index(choices))


@settings(max_examples=500, deadline=None)
@given(pieces)
def test_indexes_of_words(text: bytes) -> None:
    index_law(b'{"weight_map":{' + text)


def test_the_seeds() -> None:
    accepted = [header_law(text, data_bytes) for text, data_bytes in seeds.HEADERS]
    assert accepted == [True] * 5 + [False] * 3 + [True]
    assert [index_law(content) for content in seeds.INDEXES] == [True, True, False, False, False]


def test_the_grammar_gets_past_the_reader() -> None:
    """Fuzzing would prove little if hardly anything were accepted, or everything."""
    choices = [bytes((number * factor + step) % 256 for step in range(90)) for number in range(40) for factor in (1, 7)]
    for accepted in (
        [header_law(*grammar.header(one)) for one in choices],
        [index_law(grammar.index(one)) for one in choices],
    ):
        assert len(choices) // 20 < sum(accepted) < len(choices)


def test_whole_files() -> None:
    for content in FOLDER.values():
        assert file_law(content)
        assert not file_law(content + b"x")
        assert not file_law(content[:-1])


# --- what fuzzing found: a difference that the list did not name yet -------------------------------------------------

NESTED = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":[[[[[[[[[1]]]]]]]]]}}'


@pytest.mark.parametrize("text", [NESTED, NESTED[:-1] + b',"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'])
def test_nesting_in_what_nobody_reads(text: bytes) -> None:
    assert not header_law(text, 1)


# --- the laws can be broken ------------------------------------------------------------------------------------------


def test_a_parser_that_lets_holes_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hole = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}).encode()
    assert not header_law(hole, 2)
    monkeypatch.setattr(header, "_misplaced", lambda *_: None)
    parsed = header.Header({}, {}, "")
    monkeypatch.setattr(header, "parse", lambda *_, **__: parsed)
    with pytest.raises(Broken, match="smelt reads"):
        header_law(hole, 2)


def test_a_parser_that_is_too_strict_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError("not today")

    text, data_bytes = seeds.HEADERS[0]
    monkeypatch.setattr(header, "parse", refuse)
    with pytest.raises(Broken, match="without an allowed reason"):
        header_law(text, data_bytes)


@pytest.mark.parametrize(
    "names", [{"a": ONE, "b": ONE}, {"a": OTHER, "b": ONE, "c": TWO}, {"a": ONE, "c": ONE, "b": TWO}]
)
def test_an_index_that_is_believed_is_found(monkeypatch: pytest.MonkeyPatch, names: dict[str, str]) -> None:
    content = json.dumps({"weight_map": names}).encode()
    assert index_law(content)
    monkeypatch.setattr(shards, "contradictions", lambda *_, **__: ())
    monkeypatch.setattr(shards, "_stray", lambda *_: ())
    with pytest.raises(Broken, match="an unsound folder is accepted"):
        index_law(content)


# --- every allowed difference happens: a reason that nothing needs would be a hole in the law ------------------------

_ONE = b'"dtype":"U8","shape":[1],"data_offsets":[0,1]'
HEADER_EXAMPLES: dict[str, bytes] = {
    "a key twice": b'{"a":{%s},"a":{%s}}' % (_ONE, _ONE),
    "white space first": b' {"a":{%s}}' % _ONE,
    "metadata null": b'{"a":{%s},"__metadata__":null}' % _ONE,
    "entry as a list, or with further fields": b'{"a":{%s,"x":1}}' % _ONE,
    "a length beyond 2^62 beside a zero": b'{"b":{"dtype":"U8","shape":[0,9223372036854775808],"data_offsets":[0,0]},'
    b'"a":{%s}}' % _ONE,
    "dtype as an object": b'{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
    "nesting in what nobody reads": NESTED,
}
_MAP = b'"weight_map":{"a":"%s","b":"%s","c":"%s"}' % (ONE.encode(), ONE.encode(), TWO.encode())
INDEX_EXAMPLES: dict[str, bytes] = {
    "a key twice": b"{%s,%s}" % (_MAP, _MAP),
    "empty": b'{"weight_map":{}}',
    "another file than a safetensors file of the folder": b'{"weight_map":{"a":"../x.safetensors"}}',
    "nesting": b'{%s,"x":%s}' % (_MAP, b"[" * 70 + b"]" * 70),
    "a number of absurd length": b'{%s,"x":%s}' % (_MAP, b"1" * 401),
    "NaN or Infinity": b'{%s,"x":[NaN]}' % _MAP,
    "half a surrogate pair": b'{%s,"x":"\\ud800"}' % _MAP,
}


def test_every_allowed_difference_has_an_example() -> None:
    assert (STRICTER_HEADERS.keys(), STRICTER_INDEXES.keys()) == (HEADER_EXAMPLES.keys(), INDEX_EXAMPLES.keys())


@pytest.mark.parametrize("name", HEADER_EXAMPLES)
def test_headers_that_only_the_library_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not header_law(HEADER_EXAMPLES[name], 1)
    monkeypatch.delitem(STRICTER_HEADERS, name)
    with pytest.raises(Broken):
        header_law(HEADER_EXAMPLES[name], 1)


@pytest.mark.parametrize("name", INDEX_EXAMPLES)
def test_indexes_that_only_python_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not index_law(INDEX_EXAMPLES[name])
    monkeypatch.delitem(STRICTER_INDEXES, name)
    with pytest.raises(Broken):
        index_law(INDEX_EXAMPLES[name])
