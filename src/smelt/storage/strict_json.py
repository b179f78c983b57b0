"""Strict JSON: what a checkpoint's header, index and configs may contain, refused by name when it is anything else.

Python's own parser does the reading. Around it: UTF-8 without stray surrogates, a cap on nesting, no key twice in one
object (Python, like most parsers, would silently keep the last), and no number of absurd length.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from smelt.errors import InputError

Json = dict[str, Any] | list[Any] | str | int | float | bool | None

_MAX_DIGITS = 400
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BOM = b"\xef\xbb\xbf"


class _Refused(ValueError):
    """A value that this reader does not take, met in the middle of parsing."""


def parse(data: bytes, *, where: Sequence[str], depth: int = 64, constants: bool = False) -> Json:
    """Parse one JSON text, with or without a byte-order mark.

    `where` goes into errors; `depth` caps the nesting; `constants` lets NaN and Infinity pass, which some configs
    hold. Raises InputError for anything else than strict JSON.
    """
    data = data.removeprefix(_BOM)
    deepest = nesting(data)
    if deepest > depth:
        raise InputError(f"JSON is nested {deepest} deep, at most {depth} is allowed", where=where)
    repeated: list[tuple[str, dict[str, Any]]] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if len(unique) != len(pairs):
            count = Counter(key for key, _ in pairs)
            repeated.append((count.most_common(1)[0][0], unique))
        return unique

    try:
        value: Json = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=collect,
            parse_int=_integer,
            parse_constant=None if constants else _constant,
        )
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", where=where) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"not valid JSON: {error.msg} ({place})", where=where) from error
    except (_Refused, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=where) from error
    if repeated:
        key, owner = repeated[0]
        path = _path(value, owner)
        inside = f" in {'.'.join(path)}" if path else ""
        raise InputError(f"JSON has the key {key!r} twice{inside}", where=where)
    if _SURROGATE.search(data):
        _check_text(value, where)
    return value


def nesting(data: bytes) -> int:
    """How deep brackets are nested in a JSON text, without parsing it: exact up to the first error in the text.

    >>> nesting(b'{"a[[[": [1, [2]]}')
    3
    """
    if b"\\" in data:
        data = _ESCAPE.sub(b"", data)
    text = np.frombuffer(data, np.uint8)
    step = _STEP[text[_STRUCTURAL[text]]]  # +1 opens, -1 closes, 0 is a quote
    if not len(step):
        return 0
    outside = np.cumsum(step == 0, dtype=np.int32) % 2 == 0
    return int(np.cumsum(np.where(outside, step, 0), dtype=np.int32).max(initial=0))


_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_STRUCTURAL = _STEP != 0
_STRUCTURAL[ord('"')] = True


def _integer(text: str) -> int | float:
    if len(text) > _MAX_DIGITS:
        raise _Refused(f"a number of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is not a JSON number")


def _path(value: Json, owner: dict[str, Any]) -> list[str]:
    """The keys that lead from `value` to the object `owner`; empty when it is the top, or was itself overwritten."""
    pending: list[tuple[Json, list[str]]] = [(value, [])]
    while pending:
        node, path = pending.pop()
        if node is owner:
            return path
        if isinstance(node, dict):
            pending.extend((child, [*path, key]) for key, child in node.items())
        elif isinstance(node, list):
            pending.extend((child, [*path, str(number)]) for number, child in enumerate(node))
    return []


def _check_text(value: Json, where: Sequence[str]) -> None:
    """Refuse strings that hold half a surrogate pair: they cannot be written as UTF-8 again."""
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, str):
            try:
                node.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(f"not valid Unicode: {node!r}", where=where) from error
        elif isinstance(node, dict):
            pending.extend(node.keys())
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)
