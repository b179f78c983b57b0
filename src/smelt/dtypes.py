"""One table of element types: safetensors code, bits, and how values are decoded to float32 and encoded back.

bfloat16 is decoded and encoded by integer arithmetic on uint16 views, because NumPy has no such type.
Types that cannot be averaged (integers, packed floats) are carried as bytes only.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    value, for a floating type.
    """

    code: str
    name: str
    bits: int
    floating: bool = False
    finite_max: float = 0.0

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

_TABLE = (
    F64,
    F32,
    F16,
    BF16,
    DType("F8_E4M3", "float8_e4m3fn", 8),
    DType("F8_E5M2", "float8_e5m2", 8),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8),
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
}
"""The words a recipe may use for `dtype` and `out_dtype`."""


def promote(dtypes: list[DType]) -> DType:
    """The smallest floating type that holds every value of the given floating types.

    >>> promote([BF16, F16]).name
    'float32'
    """
    distinct = set(dtypes)
    if len(distinct) == 1:
        return dtypes[0]
    return F64 if F64 in distinct else F32


def decode(raw: Bytes, dtype: DType, out: Float32) -> None:
    """Decode `raw` (uint8, the stored bytes) of a floating `dtype` into `out` (float32, same number of elements)."""
    if dtype is BF16:
        np.left_shift(raw.view("<u2"), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, raw.view(_NUMPY[dtype.code]), casting="same_kind")


def encode(values: Float32, dtype: DType, raw: Bytes) -> None:
    """Encode float32 `values` into `raw` (uint8), rounding once, to nearest and ties to even.

    A NaN stays a NaN; a value beyond the type's range becomes an infinity.
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
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(raw.view(_NUMPY[dtype.code]), values, casting="same_kind")


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def nonfinite(raw: Bytes, dtype: DType) -> NDArray[np.bool_]:
    """True where the stored element of a floating `dtype` is a NaN or an infinity (all exponent bits set)."""
    unsigned, exponent = _EXPONENT[dtype.code]
    found: NDArray[np.bool_] = (raw.view(unsigned) & exponent) == exponent
    return found


def any_nonfinite(raw: Bytes, dtype: DType) -> bool:
    """Whether any stored element of a floating `dtype` is a NaN or an infinity."""
    return bool(nonfinite(raw, dtype).any())


_EXPONENT: dict[str, tuple[str, Any]] = {
    "F64": ("<u8", np.uint64(0x7FF0000000000000)),
    "F32": ("<u4", np.uint32(0x7F800000)),
    "F16": ("<u2", np.uint16(0x7C00)),
    "BF16": ("<u2", np.uint16(0x7F80)),
}
