"""What a run will cost, from its plan: passes over each tensor, bytes read and written, peak memory, linear algebra."""

from __future__ import annotations

from dataclasses import dataclass, field

from smelt.engine.backends import CPU, default_tile, default_workers
from smelt.engine.copying import PIECE
from smelt.engine.reducing import bind, schedule
from smelt.engine.run import KEEP_BYTES, worth_kernels
from smelt.engine.tiles import Geometry
from smelt.methods.api import Cost
from smelt.planning.entries import Action, Entry, Plan

INTERPRETER = 120 << 20
"""Resident bytes of Python with NumPy and what smelt loads, before any tile."""
COMPILER = 180 << 20
"""Resident bytes of numba at its largest: while it compiles, the first time a kernel is used on a machine."""
TORCH = 1 << 30
"""Resident bytes of torch with what it loads for a device."""
PER_ENTRY = 3000
"""Bytes of bookkeeping per output tensor."""
FLOPS = 2e10
"""Operations that one core does in a second of LAPACK in float64; 1 to 5 · 10¹⁰ by core and size of the matrix."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes read count each pass that cannot keep its input; `memory` is an upper estimate of the resident peak.

    `device_memory` is an estimate of the device's memory that one worker needs; 0 on the CPU. `work` holds the linear
    algebra of those tensors that need any, `seconds` a rough guess of what all of it takes on the CPU.
    """

    bytes_read: int
    bytes_written: int
    passes: dict[str, int]
    memory: int
    workers: int
    device: str = CPU
    device_memory: int = 0
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


def forecast(plan: Plan, *, workers: int | None = None, tile: int | None = None, device: str = CPU) -> Forecast:
    """Predict a run with these settings."""
    workers = workers or default_workers(device)
    tile = tile or default_tile(device)
    read = 0
    counts: dict[str, int] = {}
    work: dict[str, Cost] = {}
    stored = worked = largest = kept = 0
    for entry in plan.entries:
        if (cost := work_of(entry)) is not None:
            work[entry.name] = cost
        count = counts[entry.name] = passes(entry)
        fits = entry.input_bytes <= KEEP_BYTES
        kept += entry.input_bytes if count > 1 and fits else 0
        read += entry.input_bytes * (1 if fits else count)
        buffers, tiles = _worker_bytes(entry, tile)
        tiles += 0 if cost is None else cost.bytes
        stored, worked, largest = max(stored, buffers), max(worked, tiles), max(largest, buffers + tiles)
    memory = INTERPRETER + PER_ENTRY * len(plan.entries) + min(kept, KEEP_BYTES)
    if device != CPU:  # stored bytes of a task are on the host, those of a tile on the device as well
        memory += TORCH + workers * stored
        return Forecast(read, plan.output_bytes, counts, memory, workers, device, stored + worked, work)
    memory += workers * largest
    if worth_kernels(plan):
        memory += COMPILER
    return Forecast(read, plan.output_bytes, counts, memory, workers, work=work)


def work_of(entry: Entry) -> Cost | None:
    """The linear algebra that a tensor's method does on it, if any."""
    if entry.action is not Action.MERGE or not entry.size:
        return None
    return bind(entry).cost(entry.shape)  # type: ignore[no-any-return]


def _worker_bytes(entry: Entry, tile: int) -> tuple[int, int]:
    """Of one worker for this tensor: buffers of a task's stored bytes; float32 tiles and float64 temporaries."""
    if entry.action is not Action.MERGE:
        return min(PIECE, entry.nbytes), 0
    geometry = Geometry.of(entry.shape, bind(entry).grain, tile=tile)
    task, tile = min(geometry.task, geometry.size), min(geometry.tile, geometry.size)
    stored = sum(source.tensor.dtype.nbytes(8 * task) // 8 for source in entry.sources)
    models = len(entry.sources)
    return stored + entry.dtype.nbytes(8 * task) // 8, 4 * task + tile * (4 * (3 * models + 2) + 8 * (models + 6))
