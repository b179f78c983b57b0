"""Random choice by rank: what the loops on stored bytes are told for della."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.feeding import feed_rows
from smelt.engine.kernels.loading import Loop
from smelt.engine.kernels.sizes import ROW_PARTS, WORD
from smelt.engine.kernels.task_vectors import mixing, stream_keys
from smelt.engine.tiles import PIECE
from smelt.methods.reducers import LANES

_ADD_MAGNITUDES = Loop("ranks", "add_magnitudes")
_MIX = Loop("ranks", "mix_tile")
_DECIDED = "which entries della keeps"


def _marks(given: Given, *, lasting: Any) -> tuple[Any, int]:
    """Room for the bits of rows, [n, rows, whole words of bytes], and the place of the tile's first row in it.

    `lasting` is what the tensor keeps between passes; where it is None, there is room for one row at a time.
    """
    if lasting is None:
        return given.scratch.array("marks", (given.models, 1, _row_bytes(given)), np.uint8), 0
    return lasting, given.start // given.width


def _row_bytes(given: Given) -> int:
    return -(-given.width // WORD) * WORD // 8


def _settings(method: Any, given: Given) -> tuple[Any, ...]:
    """Density and epsilon of the models, and the keys of their random numbers."""
    each = (np.ascontiguousarray(field.reshape(-1), dtype=np.float64) for field in (method.density, method.epsilon))
    return (*each, stream_keys(given))


def _place(given: Given, lasting: Any) -> tuple[Any, ...]:
    """Width and block, room for a piece, room for bits."""
    room = given.scratch.array("ranks", (ROW_PARTS, PIECE + WORD), np.uint32)
    return given.width, given.block, room, *_marks(given, lasting=lasting)


def magnitudes(method: Any, given: Given, *reducers: Any) -> Any:
    """Partial results of Σ abs(d_i) and of Σ abs of what is kept: lanes [blocks, n, 256] of both."""
    if (fed := feed_rows(given)) is None:
        return None
    whole, kept = (np.zeros((given.models, -(-given.count // given.block), LANES)) for _ in range(2))
    lasting = given.keep(_DECIDED, (given.models, given.size // given.width, _row_bytes(given)))
    settings = _settings(method, given)
    _ADD_MAGNITUDES(*fed, *settings, given.start, given.count, *_place(given, lasting), whole, kept)
    return whole.transpose(1, 0, 2), kept.transpose(1, 0, 2)


def tile(method: Any, given: Given, out: Any, *, elected: bool) -> bool | None:
    """The tile of a method that keeps entries by rank, weighs and mixes them, as stored elements of the output."""
    if (fed := feed_rows(given)) is None:
        return None
    lasting = given.kept(_DECIDED)
    kind, *mixed = given.once("how the tile is mixed", lambda: mixing(method, given, elected=elected))
    chosen = (int(lasting is not None), kind, *_settings(method, given))
    return bool(_MIX(*fed, *chosen, given.start, *_place(given, lasting), *mixed, float(method.lambda_), out))


def _functions() -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, elected in (("della", True), ("della_linear", False)):
        yield (name, "whole", "kept"), magnitudes
        yield (name, "tile"), partial(tile, elected=elected)


FUNCTIONS: dict[tuple[str, ...], Any] = dict(_functions())
"""(method, function) or (method, reductions of one pass...) -> kernel."""
