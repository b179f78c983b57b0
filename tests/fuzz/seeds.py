"""Where fuzzing begins: sound and nearly sound headers and indexes, and the words that they are made of."""

from __future__ import annotations

import json

from fuzz.laws import ONE, OTHER, TWO

_A = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
_B = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}
_C = {"dtype": "F4", "shape": [2, 1], "data_offsets": [11, 12]}

HEADERS = [
    (json.dumps({"__metadata__": {"format": "pt"}, "a": _A, "b": _B, "c": _C}).encode(), 12),
    (json.dumps({"a": _A}, separators=(",", ":")).encode() + b"   ", 8),
    (json.dumps({"a": {**_A, "shape": [0], "data_offsets": [0, 0]}, "b": {**_B, "data_offsets": [0, 3]}}).encode(), 3),
    (json.dumps({"ä/ \U0001f525": _A}, ensure_ascii=False).encode(), 8),
    (json.dumps({"s": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}).encode(), 2),
    (b'{"a":["F32",[2],[0,8]]}', 8),
    (b'{"a":{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}}', 8),
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":[[1]]},"__metadata__":null}', 8),
    (b"{}", 0),
]
"""(header text, bytes of data behind it)."""

INDEXES = [
    json.dumps({"metadata": {"total_size": 3}, "weight_map": {"a": ONE, "b": ONE, "c": TWO}}).encode(),
    json.dumps({"weight_map": {"a": OTHER, "b": ONE, "c": TWO, "d": OTHER}}).encode(),
    json.dumps({"weight_map": {"a": "../x.safetensors", "b": "/etc/passwd", "c": "C:x.safetensors"}}).encode(),
    b'\xef\xbb\xbf{"weight_map":{"a":"' + ONE.encode() + b'"},"metadata":{"x":[NaN,1e999,-0]}}',
    b'{"weight_map":{}}',
]

WORDS = [
    *(b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"weight_map"', b'"metadata"', b'"total_size"'),
    *(f'"{code}"'.encode() for code in ("F32", "F16", "BF16", "U8", "BOOL", "F4", "F6_E2M3", "F8_E4M3", "C64", "I64")),
    *(b"[0,8]", b"[8,11]", b"[]", b"{}", b"null", b"true", b"NaN", b"-0", b"0.0", b"1e0", b"01", b"-1"),
    *(
        b"9223372036854775808",
        b"4611686018427387904",
        b"18446744073709551616",
        b'"\\u0061"',
        b'"\\ud800"',
        b"\\ud83d\\udd25",
    ),
    *(b",", b":", b"{", b"}", b"[", b"]", b'"a":', b'"b":', b" ", b"\n", b"\xef\xbb\xbf", b"\xc0\x80", b"\xed\xa0\x80"),
    *(f'"{name}"'.encode() for name in (ONE, TWO, OTHER)),
    *(b".safetensors", b"../", b"\\\\", b"PK\x03\x04", b"\x80\x02", b"version "),
]
