"""What a run will cost, from its plan: passes over each tensor, bytes read and written, peak memory."""

from __future__ import annotations

from dataclasses import dataclass

from smelt.engine.copying import PIECE
from smelt.engine.reducing import bind, schedule
from smelt.engine.run import KEEP_BYTES, default_workers, worth_kernels
from smelt.engine.tiles import DEFAULT_TILE, Geometry
from smelt.planning.entries import Action, Entry, Plan

INTERPRETER = 120 << 20
"""Resident bytes of Python with NumPy and what smelt loads, before any tile."""
COMPILER = 180 << 20
"""Resident bytes of numba at its largest: while it compiles, the first time a kernel is used on a machine."""
PER_ENTRY = 3000
"""Bytes of bookkeeping per output tensor."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes read count each pass that cannot keep its input; `memory` is an upper estimate of the resident peak."""

    bytes_read: int
    bytes_written: int
    passes: dict[str, int]
    memory: int
    workers: int


def passes(entry: Entry) -> int:
    """How often the tensor's values are gone through: 1, and one for each round of its reductions."""
    if entry.action is not Action.MERGE:
        return 1
    return 1 + max((start + r.reducer.rounds for start, r in schedule(bind(entry).active())), default=0)


def forecast(plan: Plan, *, workers: int | None = None, tile: int | None = None) -> Forecast:
    """Predict a run with these settings."""
    workers = workers or default_workers()
    tile = tile or DEFAULT_TILE
    read = 0
    counts: dict[str, int] = {}
    largest = kept = 0
    for entry in plan.entries:
        count = counts[entry.name] = passes(entry)
        fits = entry.input_bytes <= KEEP_BYTES
        kept += entry.input_bytes if count > 1 and fits else 0
        read += entry.input_bytes * (1 if fits else count)
        largest = max(largest, _worker_bytes(entry, tile))
    memory = INTERPRETER + PER_ENTRY * len(plan.entries) + workers * largest + min(kept, KEEP_BYTES)
    if worth_kernels(plan):
        memory += COMPILER
    return Forecast(read, plan.output_bytes, counts, memory, workers)


def _worker_bytes(entry: Entry, tile: int) -> int:
    """Buffers of one worker for this tensor: stored bytes of a task, float32 tiles and float64 temporaries."""
    if entry.action is not Action.MERGE:
        return min(PIECE, entry.nbytes)
    geometry = Geometry.of(entry.shape, bind(entry).grain, tile=tile)
    task, tile = min(geometry.task, geometry.size), min(geometry.tile, geometry.size)
    stored = sum(source.tensor.dtype.nbytes(8 * task) // 8 for source in entry.sources)
    models = len(entry.sources)
    return stored + entry.dtype.nbytes(8 * task) // 8 + 4 * task + tile * (4 * (3 * models + 2) + 8 * (models + 6))
