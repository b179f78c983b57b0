"""What a run will cost, from its plan: passes over each tensor, bytes read and written, peak memory, linear algebra."""

from __future__ import annotations

from dataclasses import dataclass, field

from smelt.engine.reducing import bind, schedule
from smelt.engine.run import KEEP_BYTES, WORTH_KERNELS, default_workers
from smelt.engine.tiles import DEFAULT_TILE, Geometry
from smelt.methods.api import Cost
from smelt.planning.entries import Action, Entry, Plan
from smelt.specs import Grain

INTERPRETER = 120 << 20
"""Resident bytes of Python with NumPy and what smelt loads, before any tile."""
COMPILER = 180 << 20
"""Resident bytes of numba at its largest: while it compiles, the first time a kernel is used on a machine."""
PER_ENTRY = 3000
"""Bytes of bookkeeping per output tensor."""
FLOPS = 2e10
"""Operations that one core does in a second of LAPACK in float64; 1 to 5 · 10¹⁰ by core and size of the matrix."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes read count each pass that cannot keep its input; `memory` is an upper estimate of the resident peak.

    `work` holds the linear algebra of those tensors that need any, `seconds` a rough guess of what all of it takes.
    """

    bytes_read: int
    bytes_written: int
    passes: dict[str, int]
    memory: int
    workers: int
    work: dict[str, Cost] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of linear algebra: as long as its largest tensor on one core, and as all of them on all workers."""
        flops = [cost.flops for cost in self.work.values()]
        return max(max(flops, default=0.0), sum(flops) / self.workers) / FLOPS


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
    work: dict[str, Cost] = {}
    largest = kept = 0
    for entry in plan.entries:
        if (cost := work_of(entry)) is not None:
            work[entry.name] = cost
        count = counts[entry.name] = passes(entry)
        fits = entry.input_bytes <= KEEP_BYTES
        kept += entry.input_bytes if count > 1 and fits else 0
        read += entry.input_bytes * (1 if fits else count)
        largest = max(largest, _worker_bytes(entry, tile) + (0 if cost is None else cost.bytes))
    memory = INTERPRETER + PER_ENTRY * len(plan.entries) + workers * largest + min(kept, KEEP_BYTES)
    if plan.input_bytes >= WORTH_KERNELS:
        memory += COMPILER
    return Forecast(read, plan.output_bytes, counts, memory, workers, work)


def work_of(entry: Entry) -> Cost | None:
    """The linear algebra that a tensor's method does on it, if any."""
    if entry.action is not Action.MERGE or not entry.size:
        return None
    return bind(entry).cost(entry.shape)  # type: ignore[no-any-return]


def _worker_bytes(entry: Entry, tile: int) -> int:
    """Buffers of one worker for this tensor: stored bytes of a task, float32 tiles and float64 temporaries."""
    grain = bind(entry).grain if entry.action is Action.MERGE else Grain.ELEMENT
    geometry = Geometry.of(entry.shape, grain, tile=tile)
    task, tile = min(geometry.task, geometry.size), min(geometry.tile, geometry.size)
    stored = sum(source.tensor.dtype.nbytes(8 * task) // 8 for source in entry.sources)
    if entry.action is not Action.MERGE:
        return stored
    models = len(entry.sources)
    return stored + entry.dtype.nbytes(8 * task) // 8 + 4 * task + tile * (4 * (3 * models + 2) + 8 * (models + 6))
