"""One table of element types: safetensors code, bits, and how values are decoded to float32 and encoded back.

bfloat16 is decoded and encoded by integer arithmetic on uint16 views, and the floats of 8 bits by tables that follow
from their layouts, because NumPy has no such types. Types that cannot be averaged (integers, packed floats) are carried
as bytes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type as safetensors stores it.

    `code` is the header's word (`BF16`), `name` the field's (`bfloat16`), `bits` the size of one element. `floating`
    is true when values may be merged: decoded to float32, worked on, encoded. `finite_max` is the largest finite
    value, for a floating type. `saturates` is true where a value beyond it is stored as that value, and not as an
    infinity or a NaN.
    """

    code: str
    name: str
    bits: int
    floating: bool = False
    finite_max: float = 0.0
    saturates: bool = False

    def nbytes(self, count: int) -> int:
        """Bytes of `count` elements; sub-byte types must fill whole bytes (ValueError otherwise)."""
        bits = self.bits * count
        if bits % 8:
            raise ValueError(f"{count} elements of {self.code} do not fill whole bytes")
        return bits // 8

    def __str__(self) -> str:
        return self.name


F64 = DType("F64", "float64", 64, True, float(np.finfo(np.float64).max))
F32 = DType("F32", "float32", 32, True, float(np.finfo(np.float32).max))
F16 = DType("F16", "float16", 16, True, 65504.0)
BF16 = DType("BF16", "bfloat16", 16, True, float.fromhex("0x1.fep127"))
F8_E4M3 = DType("F8_E4M3", "float8_e4m3fn", 8, True, 448.0, saturates=True)
F8_E5M2 = DType("F8_E5M2", "float8_e5m2", 8, True, 57344.0)
F8_E4M3FNUZ = DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8, True, 240.0)
F8_E5M2FNUZ = DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8, True, 57344.0)

_TABLE = (
    F64,
    F32,
    F16,
    BF16,
    F8_E4M3,
    F8_E5M2,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    DType("F8_E8M0", "float8_e8m0fnu", 8),
    DType("F6_E2M3", "float6_e2m3fn", 6),
    DType("F6_E3M2", "float6_e3m2fn", 6),
    DType("F4", "float4_e2m1fn", 4),
    DType("C64", "complex64", 64),
    DType("I64", "int64", 64),
    DType("I32", "int32", 32),
    DType("I16", "int16", 16),
    DType("I8", "int8", 8),
    DType("U64", "uint64", 64),
    DType("U32", "uint32", 32),
    DType("U16", "uint16", 16),
    DType("U8", "uint8", 8),
    DType("BOOL", "bool", 8),
)

BY_CODE = {dtype.code: dtype for dtype in _TABLE}
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
OUTPUT_NAMES = {
    "float64": F64,
    "float32": F32,
    "float16": F16,
    "bfloat16": BF16,
    "fp32": F32,
    "fp16": F16,
    "bf16": BF16,
    "float8_e4m3fn": F8_E4M3,
    "float8_e5m2": F8_E5M2,
}
"""The words a recipe may use for `dtype` and `out_dtype`."""


def promote(dtypes: list[DType]) -> DType:
    """The smallest floating type that holds every value of the given floating types.

    Of different floats of 8 bits that is bfloat16: float16 would do too, but has the smaller range.

    >>> promote([BF16, F16]).name
    'float32'
    >>> promote([F8_E4M3, F16]).name
    'float16'
    """
    distinct = set(dtypes)
    if len(distinct) == 1:
        return dtypes[0]
    wider = {dtype for dtype in distinct if dtype.bits > 8}
    if len(wider) < 2:
        return next(iter(wider), BF16)
    return F64 if F64 in wider else F32


def decode(raw: Bytes, dtype: DType, out: Float32) -> None:
    """Decode `raw` (uint8, the stored bytes) of a floating `dtype` into `out` (float32, same number of elements).

    Exact for every type but float64, which is rounded. A NaN stays a NaN.
    """
    if dtype is BF16:
        np.left_shift(raw.view("<u2"), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    elif dtype.bits == 8:
        np.take(table_of_values(dtype), raw, out=out, mode="clip")
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, raw.view(_NUMPY[dtype.code]), casting="same_kind")


def encode(values: Float32, dtype: DType, raw: Bytes) -> None:
    """Encode float32 `values` into `raw` (uint8), rounding once, to nearest and ties to even.

    A NaN stays a NaN; a value beyond the type's range becomes an infinity. The types without infinities do as torch's
    `to` does: float8_e4m3fn saturates at its largest value, infinities too, and the FNUZ types give a NaN.
    """
    if dtype is BF16:
        bits = values.view(np.uint32)
        stored = raw.view("<u2")
        rounded = (bits >> np.uint32(16)) & np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        np.copyto(stored, rounded, casting="unsafe")
        nan = np.isnan(values)
        if nan.any():
            stored[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    elif dtype.bits == 8:
        bits = values.view(np.uint32)
        odd = (bits & np.uint32(0xFFFF)) != 0
        np.take(_table_of_codes(dtype), (bits >> np.uint32(16)) | odd, out=raw, mode="clip")
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(raw.view(_NUMPY[dtype.code]), values, casting="same_kind")


def saturated(values: Float32, dtype: DType) -> NDArray[np.intp]:
    """Where `encode` cuts a value to the range of a `dtype` that saturates: indices, none for other types.

    Such a loss leaves no trace in the stored bytes, as an infinity would.
    """
    if not dtype.saturates:
        return np.empty(0, dtype=np.intp)
    return np.flatnonzero(np.abs(values) > np.float32(_SATURATES_ABOVE[dtype.code]))


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_SATURATES_ABOVE = {"F8_E4M3": 464.0}
"""Halfway between the largest value and the next that there would be; what is halfway is rounded down, to even."""


@dataclass(frozen=True, slots=True)
class Layout8:
    """A float of 8 bits: a sign, an exponent with its bias, `mantissa` bits.

    Positive codes up to `largest` are finite numbers. What is too large is stored as code `overflow`, a NaN as code
    `nan`; both get the sign, except in the FNUZ types (`signed` false), where 0x80 is the one NaN and there is no -0.
    """

    mantissa: int
    bias: int
    largest: int
    overflow: int
    nan: int
    signed: bool = True


LAYOUTS = {
    "F8_E4M3": Layout8(mantissa=3, bias=7, largest=0x7E, overflow=0x7E, nan=0x7F),
    "F8_E5M2": Layout8(mantissa=2, bias=15, largest=0x7B, overflow=0x7C, nan=0x7F),
    "F8_E4M3FNUZ": Layout8(mantissa=3, bias=8, largest=0x7F, overflow=0x80, nan=0x80, signed=False),
    "F8_E5M2FNUZ": Layout8(mantissa=2, bias=16, largest=0x7F, overflow=0x80, nan=0x80, signed=False),
}
"""The floats of 8 bits, by code."""


@cache
def table_of_values(dtype: DType) -> Float32:
    """The value of each code of a float of 8 bits: float32 [256], exact. Every NaN is the quiet one, with its sign."""
    layout = LAYOUTS[dtype.code]
    codes = np.arange(128)
    exponent, fraction = codes >> layout.mantissa, codes & ((1 << layout.mantissa) - 1)
    normal = exponent > 0
    whole = fraction + (normal << layout.mantissa)
    positive = np.ldexp(whole, np.where(normal, exponent, 1) - layout.bias - layout.mantissa).astype(np.float32)
    positive[codes > layout.largest] = np.nan
    if layout.overflow == layout.largest + 1 < 128:
        positive[layout.overflow] = np.inf
    values = np.concatenate([positive, np.copysign(positive, np.float32(-1))])
    if not layout.signed:
        values[0x80] = np.nan
    values.flags.writeable = False
    return values


@cache
def _table_of_codes(dtype: DType) -> Bytes:
    """The code of every float32 whose lower 16 bits are 0: uint8 [65536], by its upper 16 bits.

    A value with other lower bits has the code of its upper bits with the last one set: that is a value on the same side
    of everything halfway between two neighbours, since these need few bits.
    """
    layout = LAYOUTS[dtype.code]
    known = table_of_values(dtype)[: layout.largest + 1].astype(np.float64)
    beyond = 2 * known[-1] - known[-2]
    halfway = (known + np.append(known[1:], beyond)) / 2
    bits = np.arange(1 << 15, dtype=np.uint32) << np.uint32(16)
    with np.errstate(invalid="ignore"):
        values = bits.view(np.float32).astype(np.float64)
    codes = np.searchsorted(halfway, values, side="left")
    tie = halfway[np.minimum(codes, layout.largest)] == values
    codes += tie & (codes & 1 == 1)
    codes[codes > layout.largest] = layout.overflow
    codes[np.isnan(values)] = layout.nan
    negative = codes | 0x80 if layout.signed else np.where(codes == 0, 0, codes | 0x80)
    table = np.concatenate([codes, negative]).astype(np.uint8)
    table.flags.writeable = False
    return table


def nonfinite(raw: Bytes, dtype: DType) -> NDArray[np.bool_]:
    """True where the stored element of a floating `dtype` is a NaN or an infinity: by the bits that only these have."""
    unsigned, mask, wanted = _NONFINITE[dtype.code]
    found: NDArray[np.bool_] = (raw.view(unsigned) & mask) == wanted
    return found


def any_nonfinite(raw: Bytes, dtype: DType) -> bool:
    """Whether any stored element of a floating `dtype` is a NaN or an infinity."""
    return bool(nonfinite(raw, dtype).any())


_NONFINITE: dict[str, tuple[str, Any, Any]] = {
    "F64": ("<u8", np.uint64(0x7FF0000000000000), np.uint64(0x7FF0000000000000)),
    "F32": ("<u4", np.uint32(0x7F800000), np.uint32(0x7F800000)),
    "F16": ("<u2", np.uint16(0x7C00), np.uint16(0x7C00)),
    "BF16": ("<u2", np.uint16(0x7F80), np.uint16(0x7F80)),
    "F8_E4M3": ("u1", np.uint8(0x7F), np.uint8(0x7F)),
    "F8_E5M2": ("u1", np.uint8(0x7C), np.uint8(0x7C)),
    "F8_E4M3FNUZ": ("u1", np.uint8(0xFF), np.uint8(0x80)),
    "F8_E5M2FNUZ": ("u1", np.uint8(0xFF), np.uint8(0x80)),
}
