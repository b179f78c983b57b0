"""Element codecs and random numbers on torch tensors, by the same integer arithmetic as on the CPU: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = Any

_STEP = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _from_bfloat16(raw: Tensor) -> Tensor:
    return (raw.view(torch.int16).to(torch.int32) << 16).view(torch.float32)


def _to_bfloat16(values: Tensor) -> Tensor:
    """Round to nearest, ties to even; a NaN stays one. The upper half of each word is what is stored."""
    bits = values.view(torch.int32)
    rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
    words = torch.where(torch.isnan(values), bits | 0x400000, rounded)
    return (words >> 16).to(torch.int16).view(torch.uint8)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "BF16": _from_bfloat16,
    "F16": lambda raw: raw.view(torch.float16).to(torch.float32),
    "F32": lambda raw: raw.view(torch.float32),
    "F64": lambda raw: raw.view(torch.float64).to(torch.float32),
}
"""Stored bytes (uint8 [bytes]) -> float32 [elements]; types that are not here are decoded on the host."""

ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "BF16": _to_bfloat16,
    "F16": lambda values: values.to(torch.float16).view(torch.uint8),
    "F32": lambda values: values.view(torch.uint8),
    "F64": lambda values: values.to(torch.float64).view(torch.uint8),
}
"""float32 [elements] -> stored bytes; types that are not here are encoded on the host."""


def _signed(word: int) -> int:
    """A 64-bit word as the signed number of the same bits: torch has no arithmetic for unsigned ones."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _shifted(words: Tensor, by: int) -> Tensor:
    """A logical shift to the right: what an arithmetic one copies from the sign is masked away."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def uniform(stream: tuple[int, int], start: int, stop: int, arange: Callable[[int, int], Tensor]) -> Tensor:
    """Elements [start, stop) of a stream, the bits of `smelt.engine.rng.uniform`.

    `arange` gives the int64 counters [start, stop) on the device. Products wrap around, as those of unsigned words do.
    """
    first = start // 2
    words = arange(first, (stop + 1) // 2) * _signed(_STEP) + _signed(stream[0])
    words ^= _shifted(words, 30)
    words *= _signed(_MIX[0])
    words ^= _signed(stream[1])
    words ^= _shifted(words, 27)
    words *= _signed(_MIX[1])
    words ^= _shifted(words, 31)
    halves = words.view(torch.int32)[start - 2 * first : stop - 2 * first]
    return ((halves >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24
