"""Arcee Fusion, once the divergence of each row is known: digits of the entries' importance, and the tile."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.kernels.loops.elements import JIT, infinity, least, magnitude, narrow, ordered_key, widen
from smelt.engine.kernels.loops.fetch import cut, fetch


@JIT
def count_importances(
    files: Any,
    stored: Any,
    size: int,
    width: int,
    block: int,
    divergences: Any,
    digit: int,
    prefixes: Any,
    histograms: Any,
) -> None:
    """Histograms of 16 bits, from bit `digit` on, of the keys that begin with each prefix; without any, of all."""
    for low in range(0, size, block):
        high = min(low + block, size)
        at = fetch(files, stored, low, high)
        for place in range(low, high, width):
            part = cut(stored, at + place - low, at + place - low + width)
            divergence = divergences[place // width]
            for j in range(width):
                distance = np.float64(np.abs(np.float32(widen(part[0][j]) - widen(part[-1][j]))))
                digits = np.uint64(ordered_key(distance * divergence) >> np.uint64(digit))
                if prefixes.size == 0:
                    histograms[0, digits] += 1
                for k in range(prefixes.size):
                    if np.uint64(digits >> np.uint64(16)) == prefixes[k]:
                        histograms[k, digits & np.uint64(0xFFFF)] += 1


@JIT
def _fuse_row(stored: Any, base: Any, divergence: float, threshold: float, out: Any) -> bool:
    worst = least(out)
    for j in range(out.size):
        b = widen(base[j])
        delta = np.float32(widen(stored[j]) - b)
        weak = np.float64(np.abs(delta)) * divergence < threshold
        y = narrow(np.float32(b + (np.float32(0.0) if weak else delta)), out)
        out[j] = y
        worst = max(worst, magnitude(y))
    return bool(worst >= infinity(out))


@JIT
def fuse_tile(
    files: Any,
    stored: Any,
    width: int,
    block: int,
    divergences: Any,
    threshold: float,
    out: Any,
) -> bool:
    """The base, and the differences whose importance is not below the threshold; whether a number is not finite."""
    found = False
    for low in range(0, out.size, block):
        high = min(low + block, out.size)
        at = fetch(files, stored, low, high)
        for place in range(low, high, width):
            part = cut(stored, at + place - low, at + place - low + width)
            row = out[place : place + width]
            found |= _fuse_row(part[0], part[-1], divergences[place // width], threshold, row)
    return found
