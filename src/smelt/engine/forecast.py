"""What a run will cost, from its plan: passes over each tensor, bytes read and written, peak memory, linear algebra."""

from __future__ import annotations

from dataclasses import dataclass, field

from smelt.engine.backends import CPU, default_tile, default_workers
from smelt.engine.copying import PIECE
from smelt.engine.reducing import bind, schedule
from smelt.engine.run import KEEP_BYTES, worth_kernels
from smelt.engine.tiles import BLOCK, Geometry
from smelt.errors import RecipeError
from smelt.methods.api import Cost
from smelt.planning.entries import Action, Entry, Plan
from smelt.storage.files import size_text

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
    """What a run with these settings costs: `memory` is an upper estimate of the resident peak, in bytes.

    `bytes_read` counts each pass that cannot keep its input. `workers`, `tile`, `keep_bytes` and `kernels` are the
    settings, as `run` takes them. `device_memory` is an estimate of the device's memory that one worker needs; 0 on
    the CPU. `work` holds the linear algebra of those tensors that need any, `seconds` a rough guess of what all of it
    takes on the CPU.
    """

    bytes_read: int
    bytes_written: int
    passes: dict[str, int]
    memory: int
    workers: int
    tile: int
    keep_bytes: int
    kernels: bool
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


def forecast(
    plan: Plan,
    *,
    workers: int | None = None,
    tile: int | None = None,
    keep_bytes: int | None = None,
    kernels: bool | None = None,
    device: str = CPU,
) -> Forecast:
    """Predict a run with these settings; None stands for what `run` takes then."""
    return _Costs(plan, device).with_settings(
        workers=workers or default_workers(device),
        tile=tile or default_tile(device),
        keep_bytes=KEEP_BYTES if keep_bytes is None else keep_bytes,
        kernels=worth_kernels(plan) if kernels is None else kernels,
    )


class _Costs:
    """What of a prediction does not depend on the settings, or on the tile alone: found once for all that are tried."""

    def __init__(self, plan: Plan, device: str) -> None:
        self.plan = plan
        self.device = device
        self.passes = {entry.name: passes(entry) for entry in plan.entries}
        self._inputs = [(entry.input_bytes, self.passes[entry.name]) for entry in plan.entries]
        self._written = plan.output_bytes
        self._largest: dict[int, tuple[int, int, int]] = {}
        found = {entry.name: work_of(entry) for entry in plan.entries}
        self._work = {name: cost for name, cost in found.items() if cost is not None}

    def with_settings(self, *, workers: int, tile: int, keep_bytes: int, kernels: bool) -> Forecast:
        stored, worked, largest = self._buffers(tile)
        kept = sum(size for size, count in self._inputs if count > 1 and size <= keep_bytes)
        read = sum(size * (1 if size <= keep_bytes else count) for size, count in self._inputs)
        memory = INTERPRETER + PER_ENTRY * len(self._inputs) + min(kept, keep_bytes)
        settings = (workers, tile, keep_bytes, kernels)
        if self.device != CPU:  # stored bytes of a task are on the host, those of a tile on the device as well
            memory += TORCH + workers * stored
            return Forecast(
                read,
                self._written,
                self.passes,
                memory,
                *settings,
                device=self.device,
                device_memory=stored + worked,
                work=self._work,
            )
        memory += workers * largest + (COMPILER if kernels else 0)
        return Forecast(read, self._written, self.passes, memory, *settings, work=self._work)

    def _buffers(self, tile: int) -> tuple[int, int, int]:
        """The most of any tensor, for one worker: bytes of a task, those of tiles, and both together."""
        if tile not in self._largest:
            each = [self._of_worker(entry, tile) for entry in self.plan.entries] or [(0, 0)]
            self._largest[tile] = max(s for s, _ in each), max(w for _, w in each), max(s + w for s, w in each)
        return self._largest[tile]

    def _of_worker(self, entry: Entry, tile: int) -> tuple[int, int]:
        buffers, tiles = _worker_bytes(entry, tile)
        cost = self._work.get(entry.name)
        return buffers, tiles + (0 if cost is None else cost.bytes)


def within(
    memory: int, plan: Plan, *, workers: int | None = None, tile: int | None = None, device: str = CPU
) -> Forecast:
    """The fastest settings whose predicted peak is at most `memory` bytes; none of them changes a result.

    Cut are, in this order: the tile and what tensors keep between their passes, the threads, the compiled kernels.
    Raises RecipeError, with the least that would do, where all of that is not enough.
    """
    costs = _Costs(plan, device)
    most = workers or default_workers(device)
    wide = tile or default_tile(device)
    small = min(wide, BLOCK)
    steps = [(wide, KEEP_BYTES), *((small, KEEP_BYTES // part) for part in (1, 2, 4, 8)), (small, 0)]
    for kernels in [True, False] if worth_kernels(plan) else [False]:
        for count in range(most, 0, -1):
            for size, keep in steps:
                found = costs.with_settings(workers=count, tile=size, keep_bytes=keep, kernels=kernels)
                if found.memory <= memory:
                    return found
    largest = max(plan.entries, key=lambda entry: sum(_worker_bytes(entry, small)))
    raise RecipeError(
        f"the merge does not fit into {size_text(memory)} of memory",
        where=[
            f"the least is about {size_text(found.memory)}, with one thread",
            f"largest tensor {largest.name} {list(largest.shape)}",
        ],
        fix=f"allow it more: --memory {-(-found.memory // 1_000_000)}MB",
    )


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
