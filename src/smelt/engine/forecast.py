"""What a run will cost, from its plan: passes over each tensor, bytes read and written, peak memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from smelt.engine.backends import CPU, default_tile, default_workers
from smelt.engine.copying import PIECE
from smelt.engine.reducing import bind, schedule
from smelt.engine.run import KEEP_BYTES, worth_kernels
from smelt.engine.steps import remembered_bytes
from smelt.engine.tiles import Geometry
from smelt.planning.entries import Action, Entry, Plan

INTERPRETER = 120 << 20
"""Resident bytes of Python with NumPy and what smelt loads, before any tile."""
COMPILER = 180 << 20
"""Resident bytes of numba at its largest: while it compiles, the first time a kernel is used on a machine."""
TORCH = 1 << 30
"""Resident bytes of torch with what it loads for a device."""
PER_ENTRY = 3000
"""Bytes of bookkeeping per output tensor."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes read count each pass that cannot keep its input; `memory` is an upper estimate of the resident peak.

    `device_memory` is an estimate of the device's memory that one worker needs; 0 on the CPU.
    """

    bytes_read: int
    bytes_written: int
    passes: dict[str, int]
    memory: int
    workers: int
    device: str = CPU
    device_memory: int = 0
    apart_read: int = 0
    """With merges within the recipe: what they would read if each was written, and then read by the others."""
    apart_written: int = 0


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
    device: str = CPU,
    steps: Mapping[str, Plan] | None = None,
    kept: Mapping[str, bool] | None = None,
) -> Forecast:
    """Predict a run with these settings; `steps` has the plans of the merges that are read as models, by name.

    `kept` names those of them that are read from where they are written, and whether they are there already.
    """
    workers = workers or default_workers(device)
    tile = tile or default_tile(device)
    read = 0
    counts: dict[str, int] = {}
    stored = worked = largest = held = 0
    for entry in plan.entries:
        count = counts[entry.name] = passes(entry)
        fits = entry.input_bytes <= KEEP_BYTES
        held += entry.input_bytes if count > 1 and fits else 0
        read += entry.input_bytes * (1 if fits else count)
        buffers, tiles = _worker_bytes(entry, tile)
        stored, worked, largest = max(stored, buffers), max(worked, tiles), max(largest, buffers + tiles)
    memory = INTERPRETER + PER_ENTRY * len(plan.entries) + min(held, KEEP_BYTES)
    found = Forecast(read, plan.output_bytes, counts, memory, workers)
    if device != CPU:  # stored bytes of a task are on the host, those of a tile on the device as well
        memory += TORCH + workers * stored
        found = replace(found, memory=memory, device=device, device_memory=stored + worked)
    else:
        memory += workers * largest + (COMPILER if worth_kernels(plan) else 0)
        found = replace(found, memory=memory)
    return _nested(found, plan, steps, kept or {}, tile) if steps else found


def _nested(found: Forecast, plan: Plan, steps: Mapping[str, Plan], kept: Mapping[str, bool], tile: int) -> Forecast:
    """The forecast of the output's own plan, and what the merges within it add."""
    computed = {name: step for name, step in steps.items() if name not in kept}
    written = [steps[name] for name, there in kept.items() if not there]
    every = sum(_stored_bytes(entry, one, computed) for one in (plan, *written) for entry in one.entries)
    apart = [forecast(step, workers=1, tile=tile) for step in steps.values()]
    entries = [entry for step in steps.values() for entry in step.entries]
    levels = _levels(plan, steps) * max((sum(_worker_bytes(entry, tile)) for entry in entries), default=0)
    uses = Counter(model.published for one in (plan, *steps.values()) for model in one.models)
    shared = sum(count > 1 for count in uses.values()) * remembered_bytes(tile)
    lasting = KEEP_BYTES if any(count > 1 for one in apart for count in one.passes.values()) else 0
    compiler = COMPILER if found.device == CPU and not worth_kernels(plan) else 0
    return replace(
        found,
        bytes_read=every,
        bytes_written=found.bytes_written + sum(step.output_bytes for step in written),
        memory=found.memory + PER_ENTRY * len(entries) + found.workers * (levels + shared) + lasting + compiler,
        apart_read=found.bytes_read + sum(one.bytes_read for one in apart),
        apart_written=found.bytes_written + sum(one.bytes_written for one in apart),
    )


def _levels(plan: Plan, steps: Mapping[str, Plan]) -> int:
    """How many merges stand in the longest chain within the output; `steps` has each after what it is made of."""
    level: dict[str, int] = {}
    for name, step in steps.items():
        level[name] = 1 + max((level.get(model.published, 0) for model in step.models), default=0)
    return max((level.get(model.published, 0) for model in plan.models), default=0)


_Tensor = tuple[str, str]
"""A model and a tensor of it."""


def _stored_bytes(entry: Entry, plan: Plan, steps: Mapping[str, Plan]) -> int:
    """Bytes of stored models that one tensor of the output costs, through all merges that it is made of.

    What is read range by range together is read once, however many merges use it; passes that a merge makes for
    itself, for its reductions, are its own.
    """
    sizes: dict[_Tensor, int] = {}
    entries = {(name, one.name): one for name, step in steps.items() for one in step.entries}
    seen: dict[_Tensor, set[_Tensor]] = {}
    room = KEEP_BYTES

    def reads(one: Entry, of: Plan, times: int) -> tuple[Counter[_Tensor], set[_Tensor]]:
        """What is read for itself, how often; and what is read together with others, `times` times."""
        nonlocal room
        own: Counter[_Tensor] = Counter()
        together: set[_Tensor] = set()
        rounds = passes(one) - 1
        keeps = rounds > 0 and one.input_bytes <= room  # the outermost ask first
        room -= one.input_bytes if keeps else 0
        more = 1 if keeps else rounds + times
        for source in one.sources:
            key = (of.models[source.model].published, source.tensor.name)
            if key in entries:
                if key not in seen:
                    inner, seen[key] = reads(entries[key], steps[key[0]], more)
                    own += inner
                together |= seen[key]
            else:
                sizes[key] = source.tensor.nbytes
                together.add(key)
        if keeps:
            return own + Counter(together), set()
        return own + Counter(dict.fromkeys(together, rounds)), together

    own, together = reads(entry, plan, 1)
    return sum(sizes[key] * count for key, count in (own + Counter(together)).items())


def _worker_bytes(entry: Entry, tile: int) -> tuple[int, int]:
    """Of one worker for this tensor: buffers of a task's stored bytes; float32 tiles and float64 temporaries."""
    if entry.action is not Action.MERGE:
        return min(PIECE, entry.nbytes), 0
    geometry = Geometry.of(entry.shape, bind(entry).grain, tile=tile)
    task, tile = min(geometry.task, geometry.size), min(geometry.tile, geometry.size)
    stored = sum(source.tensor.dtype.nbytes(8 * task) // 8 for source in entry.sources)
    models = len(entry.sources)
    return stored + entry.dtype.nbytes(8 * task) // 8, 4 * task + tile * (4 * (3 * models + 2) + 8 * (models + 6))
