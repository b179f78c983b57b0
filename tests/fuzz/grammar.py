"""Bytes read as choices: nearly sound headers and indexes, so that fuzzing gets past the JSON reader.

Each byte decides one thing: a value, a blank, an odd spelling. Most choices lead to what is sound; a few bytes in
each table do not. The same bytes always make the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

from fuzz.laws import ONE, OTHER, TWO

_BITS = {"F32": 32, "U8": 8, "BF16": 16, "F4": 4, "F6_E2M3": 6, "I64": 64, "BOOL": 8, "F8_E4M3": 8, "C64": 64}
_ODD_TYPES = ["U9", "f32", "", "F32 "]
_LENGTHS = [1, 2, 0, 4, 3, 8, 1, 2]
_ODD_LENGTHS = [
    "-1",
    "1.0",
    "true",
    "null",
    "4611686018427387904",
    "9223372036854775808",
    "1e2",
    "-0",
    '"1"',
    "[]",
    "01",
]
_NAMES = [
    "a",
    "b",
    "c",
    "d",
    "model.layers.0.x",
    "",
    "/",
    "../a",
    "ä",
    "\\u0061",
    "\\ud83d\\udd25",
    "__metadata__",
    "{[",
]
_ODD_NAMES = ["\\ud800", "\x01", "\\x"]
_BLANKS = ["", "", "", "", " ", "\n", "\t", "\r "]
_METADATA = [
    '{"format":"pt"}',
    "{}",
    '{"a":"","b":"x"}',
    "null",
    '{"a":1}',
    "[]",
    '{"a":"1","a":"2"}',
    '{"a":"\\ud800"}',
]
_FILES = [
    ONE,
    TWO,
    OTHER,
    ONE,
    TWO,
    "../x.safetensors",
    "x.bin",
    "/x.safetensors",
    "",
    ".safetensors",
    "none.safetensors",
]


class Choices:
    """The bytes, one after the other; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._next = 0

    def number(self) -> int:
        self._next += 1
        return self._data[self._next - 1] if self._next <= len(self._data) else 0

    def of(self, usual: Sequence[str], odd: Sequence[str] = ()) -> str:
        """One of the usual words; for the highest bytes one of the odd ones."""
        number = self.number()
        if odd and number >= 244:
            return odd[number % len(odd)]
        return usual[number % len(usual)]

    def rarely(self) -> bool:
        return self.number() >= 248


def header(data: bytes) -> tuple[bytes, int]:
    """A header's text, and how many bytes of data are to follow it."""
    choices = Choices(data)
    blank = choices.of(_BLANKS)
    entries: list[str] = []
    position = 0
    for _ in range(choices.number() % 6):
        entry, position = _entry(choices, position)
        entries.append(entry)
    if choices.number() % 4 == 0:
        entries.append(f'"__metadata__":{choices.of(_METADATA)}')
    if choices.rarely():
        entries.reverse()
    text = f"{{{blank}{f',{blank}'.join(entries)}}}{choices.of(_BLANKS)}"
    if choices.rarely():
        text = choices.of([" ", "\n", "\ufeff", "["]) + text
    wrong = choices.number() % 7 - 3 if choices.rarely() else 0
    return text.encode("utf-8", "surrogatepass"), max(0, min(position, 4096) + wrong)


def _entry(choices: Choices, position: int) -> tuple[str, int]:
    name = choices.of(_NAMES, _ODD_NAMES)
    dtype = choices.of(list(_BITS), _ODD_TYPES)
    lengths = [choices.number() for _ in range(choices.number() % 4)]
    size = _BITS.get(dtype, 8)
    for number in lengths:
        size *= _LENGTHS[number % len(_LENGTHS)]
    shape = [str(_LENGTHS[number % len(_LENGTHS)]) for number in lengths]
    if shape and choices.rarely():
        shape[0] = choices.of(_ODD_LENGTHS)
    begin = position + (choices.number() % 5 - 2 if choices.rarely() else 0)
    end = position + size // 8 + (choices.number() % 5 - 2 if choices.rarely() else 0)
    offsets = [str(begin), str(end)]
    if choices.rarely():
        offsets[choices.number() % 2] = choices.of(_ODD_LENGTHS)
    fields = [f'"dtype":"{dtype}"', f'"shape":[{",".join(shape)}]', f'"data_offsets":[{",".join(offsets)}]']
    if choices.rarely():
        fields.append(choices.of(['"x":1', '"dtype":"U8"', '"shape":[]', '"x":[[[[[[[[[1]]]]]]]]]', '"x":"\\ud800"']))
    if choices.rarely():
        del fields[choices.number() % len(fields)]
    if choices.number() % 2:
        fields.reverse()
    return f'"{name}":{{{",".join(fields)}}}', position + size // 8


def index(data: bytes) -> bytes:
    """An index's text."""
    choices = Choices(data)
    blank = choices.of(_BLANKS)
    pairs = [f'"{name}":"{file}"' for name, file in (("a", ONE), ("b", ONE), ("c", TWO)) if not choices.rarely()]
    for _ in range(choices.number() % 4 if choices.number() % 3 == 0 else 0):
        pairs.append(f'"{choices.of(_NAMES, _ODD_NAMES)}":{_value(choices)}')
    parts = [f'"weight_map":{{{f",{blank}".join(pairs)}}}']
    for _ in range(choices.number() % 3):
        key = choices.of(['"metadata"', '"x"', '"weight_map"', '"total_size"'])
        parts.append(f"{key}:{choices.of(['{}', '1', '[NaN]', 'null', '1e999', '-0', '[' * 70 + ']' * 70, '9' * 401])}")
    if choices.rarely():
        parts.reverse()
    text = f"{{{blank}{','.join(parts)}}}{blank}"
    start = choices.of(["", "", "", "\ufeff", " "])
    return (start + text).encode("utf-8", "surrogatepass")


def _value(choices: Choices) -> str:
    return choices.of([f'"{file}"' for file in _FILES], ["1", "null", "[]", "true", '"\\ud800.safetensors"'])
