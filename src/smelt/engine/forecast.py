"""What a run will cost, from its plan: passes over each tensor, bytes read and written, peak memory, linear algebra."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

from smelt.engine.backends import CPU, default_tile, default_workers
from smelt.engine.copying import PIECE
from smelt.engine.inputs import SHARE
from smelt.engine.kernels import STREAMED
from smelt.engine.reducing import bind, schedule
from smelt.engine.run import KEEP_BYTES, worth_kernels
from smelt.engine.steps import remembered_bytes
from smelt.engine.tiles import BLOCK, TASK, Geometry
from smelt.engine.tiles import PIECE as KERNEL_PIECE
from smelt.engine.whole import result_bytes
from smelt.errors import RecipeError
from smelt.methods.api import Cost
from smelt.methods.selection import KthLargest
from smelt.planning.entries import Action, Entry, Plan
from smelt.planning.whole import groups, is_whole
from smelt.specs import Grain
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

    `bytes_read` counts each pass that cannot keep its input; it is more than will be read where compiled loops read by
    themselves, since parts of what they read are kept as long as there is room. `workers`, `tile`, `keep_bytes` and
    `kernels` are the settings, as `run` takes them. `device_memory` is an estimate of the device's memory that one
    worker needs; 0 on the CPU. `work` holds the linear algebra of those tensors that need any, `seconds` a rough guess
    of what all of it takes on the CPU.
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
    apart_read: int = 0
    """With merges within the recipe: what they would read if each was written, and then read by the others."""
    apart_written: int = 0
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
    return 1 + max((end for _, end in schedule(bind(entry).active())), default=0)


def forecast(
    plan: Plan,
    *,
    workers: int | None = None,
    tile: int | None = None,
    keep_bytes: int | None = None,
    kernels: bool | None = None,
    device: str = CPU,
    merges: Within | None = None,
    in_files: Container[int] = (),
) -> Forecast:
    """Predict a run with these settings; None stands for what `run` takes then.

    `merges` are those within the plan, `in_files` the places of the models that lie in local files as they are.
    """
    costs = _Costs(plan, device, merges, in_files)
    return costs.with_settings(
        workers=workers or default_workers(device),
        tile=tile or default_tile(device),
        keep_bytes=KEEP_BYTES if keep_bytes is None else keep_bytes,
        kernels=costs.worth_kernels if kernels is None else kernels,
    )


@dataclass(frozen=True, slots=True)
class Within:
    """The merges within a recipe that are read as models: their plans by name, each after those it is made of.

    `kept` names those of them that are read from where they are written, and whether they are there already.
    """

    plans: Mapping[str, Plan] = field(default_factory=dict)
    kept: Mapping[str, bool] = field(default_factory=dict)

    @property
    def computed(self) -> dict[str, Plan]:
        """Those that are not written."""
        return {name: plan for name, plan in self.plans.items() if name not in self.kept}

    @property
    def written(self) -> list[Plan]:
        """Those that the run has yet to write."""
        return [self.plans[name] for name, there in self.kept.items() if not there]

    @property
    def worked(self) -> dict[str, Plan]:
        """Those that the run does work for: all that are not there already."""
        return {name: plan for name, plan in self.plans.items() if not self.kept.get(name, False)}


class _Costs:
    """What of a prediction does not depend on the settings, or on the tile alone: found once for all that are tried."""

    def __init__(self, plan: Plan, device: str, merges: Within | None = None, in_files: Container[int] = ()) -> None:
        self.plan = plan
        self.device = device
        self.passes = {entry.name: passes(entry) for entry in plan.entries}
        self._groups = groups(plan.entries, tied=plan.tied)
        counted = {entry.name for group in self._groups for entry in group.counted}
        for group in self._groups:  # what counts for another tensor is read to be merged, and no more
            self.passes |= {entry.name: 1 for entry in group.entries if entry.name not in counted}
        self._swept = sum(e.input_bytes * self.passes[e.name] for group in self._groups for e in group.entries)
        streams = merges is None or not merges.plans
        self._inputs = [
            (entry.input_bytes, self.passes[entry.name], _streamed(entry, in_files) if streams else 0)
            for entry in plan.entries
            if not is_whole(entry)
        ]
        self._written = plan.output_bytes
        self._largest: dict[int, tuple[int, int, int]] = {}
        found = {entry.name: work_of(entry) for entry in plan.entries}
        self._work = {name: cost for name, cost in found.items() if cost is not None}
        self._merges = merges or Within()
        self._each = {name: _Costs(one, device) for name, one in self._merges.plans.items()}
        self._read: dict[int, int] = {}
        self.worth_kernels = worth_kernels(plan, *self._merges.worked.values())

    def with_settings(self, *, workers: int, tile: int, keep_bytes: int, kernels: bool) -> Forecast:
        stored, worked, largest = self._buffers(tile)
        streams = kernels and self.device == CPU
        kept = parts = 0
        read = self._swept
        for size, count, streamed in self._inputs:
            again = streamed if streams and streamed else 1 if size <= keep_bytes else count
            read += size * again
            kept += size if count > again else 0
            parts += size if streams and streamed > 1 else 0
        kept += min(parts, int(SHARE * keep_bytes))
        memory = INTERPRETER + PER_ENTRY * len(self.plan.entries) + min(kept, keep_bytes) + self._results(workers)
        settings = (workers, tile, keep_bytes, kernels)
        if self.device != CPU:  # stored bytes of a task are on the host, those of a tile on the device as well
            memory += TORCH + workers * stored
            found = Forecast(
                read,
                self._written,
                self.passes,
                memory,
                *settings,
                device=self.device,
                device_memory=stored + worked,
                work=self._work,
            )
        else:
            memory += workers * largest + (COMPILER if kernels else 0)
            found = Forecast(read, self._written, self.passes, memory, *settings, work=self._work)
        return self._with_merges(found) if self._each else found

    def _results(self, workers: int) -> int:
        """Bytes of what reductions over the whole model find."""
        return sum(result_bytes(group, workers) for group in self._groups)

    def _with_merges(self, found: Forecast) -> Forecast:
        """The forecast of the output's own plan, and what the merges within it add."""
        merges, keep = self._merges, found.keep_bytes
        apart = [
            each.with_settings(workers=1, tile=found.tile, keep_bytes=keep, kernels=found.kernels)
            for each in self._each.values()
        ]
        if keep not in self._read:
            plans, computed = (self.plan, *merges.written), merges.computed
            self._read[keep] = sum(_stored_bytes(entry, one, computed, keep) for one in plans for entry in one.entries)
        buffers = max((each._buffers(found.tile)[2] for each in self._each.values()), default=0)
        uses = Counter(model.published for one in (self.plan, *merges.plans.values()) for model in one.models)
        shared = sum(count > 1 for count in uses.values()) * remembered_bytes(found.tile)
        each_worker = _levels(self.plan, merges.plans) * buffers + shared
        entries = sum(len(one.entries) for one in merges.plans.values())
        lasting = keep if any(count > 1 for one in apart for count in one.passes.values()) else 0
        whole = sum(each._results(found.workers) for each in self._each.values())
        # tiles of one level are gone from the device when those of the next are made
        on_device = [one.device_memory for name, one in zip(self._each, apart, strict=True) if name in merges.worked]
        work = {f"{name}: {tensor}": cost for name in merges.worked for tensor, cost in self._each[name]._work.items()}
        return replace(
            found,
            bytes_read=self._read[keep],
            bytes_written=found.bytes_written + sum(one.output_bytes for one in merges.written),
            memory=found.memory + PER_ENTRY * entries + found.workers * each_worker + lasting + whole,
            device_memory=max(found.device_memory, *on_device, 0),
            work=found.work | work,
            apart_read=found.bytes_read + sum(one.bytes_read for one in apart),
            apart_written=found.bytes_written + sum(one.bytes_written for one in apart),
        )

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
    memory: int,
    plan: Plan,
    *,
    workers: int | None = None,
    tile: int | None = None,
    device: str = CPU,
    merges: Within | None = None,
    in_files: Container[int] = (),
) -> Forecast:
    """The fastest settings whose predicted peak is at most `memory` bytes; none of them changes a result.

    Cut are, in this order: the tile and what tensors keep between their passes, the threads, the compiled kernels.
    Raises RecipeError, with the least that would do, where all of that is not enough.
    """
    costs = _Costs(plan, device, merges, in_files)
    most = workers or default_workers(device)
    wide = tile or default_tile(device)
    small = min(wide, BLOCK)
    steps = [(wide, KEEP_BYTES), *((small, KEEP_BYTES // part) for part in (1, 2, 4, 8)), (small, 0)]
    for kernels in [True, False] if costs.worth_kernels else [False]:
        for count in range(most, 0, -1):
            for size, keep in steps:
                found = costs.with_settings(workers=count, tile=size, keep_bytes=keep, kernels=kernels)
                if found.memory <= memory:
                    return found
    every = [entry for one in (plan, *(merges.worked.values() if merges else ())) for entry in one.entries]
    largest = max(every, key=lambda entry: sum(_worker_bytes(entry, small)))
    raise RecipeError(
        f"the merge does not fit into {size_text(memory)} of memory",
        where=[
            f"the least is about {size_text(found.memory)}, with one thread",
            f"largest tensor {largest.name} {list(largest.shape)}",
        ],
        fix=f"allow it more: --memory {-(-found.memory // 1_000_000)}MB",
    )


def _streamed(entry: Entry, in_files: Container[int]) -> int:
    """How often compiled kernels would read the tensor by themselves; 0 if they would not.

    A k-th largest takes one pass where a sample tells around which number to look, as it nearly always does.
    """
    if entry.action is not Action.MERGE or entry.method not in STREAMED or entry.size <= TASK:
        return 0
    if not all(source.model in in_files for source in entry.sources):
        return 0
    method = bind(entry)
    if method.grain is Grain.ROW and entry.shape and entry.shape[-1] > KERNEL_PIECE:
        return 0
    return 1 + max((end for _, end in schedule(method.active(), guessed=True)), default=0)


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
    selects = any(reduction.reducer is KthLargest for reduction in bind(entry).active())  # keeps keys of every model
    numbers = 4 * task * (models if selects else 1)
    return stored + entry.dtype.nbytes(8 * task) // 8, numbers + tile * (4 * (3 * models + 2) + 8 * (models + 6))


def _levels(plan: Plan, steps: Mapping[str, Plan]) -> int:
    """How many merges stand in the longest chain within the output; `steps` has each after what it is made of."""
    level: dict[str, int] = {}
    for name, step in steps.items():
        level[name] = 1 + max((level.get(model.published, 0) for model in step.models), default=0)
    return max((level.get(model.published, 0) for model in plan.models), default=0)


_Tensor = tuple[str, str]
"""A model and a tensor of it."""


def _stored_bytes(entry: Entry, plan: Plan, steps: Mapping[str, Plan], keep_bytes: int) -> int:
    """Bytes of stored models that one tensor of the output costs, through all merges that it is made of.

    What is read range by range together is read once, however many merges use it; passes that a merge makes for
    itself, for its reductions, are its own. Passes over a whole model keep nothing, so that what a tensor is made of is
    worked out again in each of them.
    """
    sizes: dict[_Tensor, int] = {}
    entries = {(name, one.name): one for name, step in steps.items() for one in step.entries}
    seen: dict[_Tensor, set[_Tensor]] = {}
    room = keep_bytes

    def reads(one: Entry, of: Plan, times: int) -> tuple[Counter[_Tensor], set[_Tensor]]:
        """What is read for itself, how often; and what is read together with others, `times` times."""
        nonlocal room
        own: Counter[_Tensor] = Counter()
        together: set[_Tensor] = set()
        rounds = passes(one) - 1
        whole = is_whole(one)
        keeps = rounds > 0 and not whole and one.input_bytes <= room  # the outermost ask first
        room -= one.input_bytes if keeps else 0
        more = 1 if keeps else rounds + times
        for source in one.sources:
            key = (of.models[source.model].published, source.tensor.name)
            if key in entries:
                if key not in seen:
                    inner, seen[key] = reads(entries[key], steps[key[0]], 1 if whole else more)
                    again = rounds if whole and not is_whole(entries[key]) else 0
                    own += Counter({tensor: count * (1 + again) for tensor, count in inner.items()})
                together |= seen[key]
            else:
                sizes[key] = source.tensor.nbytes
                together.add(key)
        if keeps:
            return own + Counter(together), set()
        return own + Counter(dict.fromkeys(together, rounds)), together

    own, together = reads(entry, plan, 1)
    return sum(sizes[key] * count for key, count in (own + Counter(together)).items())
