"""Arcee Fusion: its divergences are found once, by the array definition; four rounds and the tile use them again."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.feeding import feed_rows
from smelt.engine.kernels.loading import Loop
from smelt.methods.arcee_fusion import divergence, quartile_counts

_COUNT_IMPORTANCES = Loop("fusion", "count_importances")
_FUSE = Loop("fusion", "fuse_tile")
_FOUND = "divergences of the rows"


def _divergences(given: Given, lasting: Any, *, first: bool) -> Any:
    """The divergences of the tile's rows, float64. They are made in the first pass, and always where none are kept.

    None where they are to be made, and what is stored is not read yet.
    """
    rows = given.count // given.width
    kept = None
    if lasting is not None:
        begin = given.start // given.width
        kept = lasting.view(np.float64)[begin : begin + rows]
        if not first:
            return kept
    if given.stored.files is not None:
        return None
    step = given.block // given.width
    x, base = given["x"][0], given["base"]
    parts = [divergence(x[low : low + step], base[low : low + step]) for low in range(0, rows, step)]
    found = np.concatenate(parts, axis=None)
    if kept is not None:
        kept[:] = found
    return found


def quartiles(method: Any, given: Given, reducer: Any) -> Any:
    """The partial result of KthLargest64 over the importances."""
    if (fed := feed_rows(given)) is None:
        return None
    lasting = given.keep(_FOUND, (given.size // given.width * 8,))
    divergences = _divergences(given, lasting, first=reducer.round == 0)
    if divergences is None:
        return None
    prefixes = reducer.prefixes(1)[0].astype(np.uint64)
    histograms = np.zeros((1, max(len(prefixes), 1), 1 << 16), dtype=np.int64)
    place = (given.count, given.width, given.block)
    _COUNT_IMPORTANCES(*fed, *place, divergences, reducer.digit, prefixes, histograms[0])
    return np.array([quartile_counts(given.size)]), histograms


def tile(method: Any, given: Given, out: Any) -> bool | None:
    """The tile, as stored elements of the output."""
    if (fed := feed_rows(given)) is None:
        return None
    divergences = _divergences(given, given.kept(_FOUND), first=False)
    if divergences is None:
        return None
    return bool(_FUSE(*fed, given.width, given.block, divergences, float(given["threshold"]), out))


FUNCTIONS: dict[tuple[str, ...], Any] = {("arcee_fusion", "quartiles"): quartiles, ("arcee_fusion", "tile"): tile}
"""(method, function) -> kernel."""
