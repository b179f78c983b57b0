"""Sweeps to files: many candidates of one recipe, each an output as a merge writes it, from one read of the inputs."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smelt import keeping
from smelt.candidates import Candidates, of_candidate, open_candidates, planning_of
from smelt.engine.backends import CPU, choose
from smelt.engine.forecast import PER_ENTRY, Forecast
from smelt.engine.run import check_equal
from smelt.engine.sharing import Known
from smelt.engine.streaming import Stream
from smelt.engine.tensor import TensorResult
from smelt.engine.variants import bytes_together, run_variants
from smelt.errors import InputError, NumericError, RecipeError, SmeltError, StorageError, raise_all
from smelt.guarding import inputs_of, refuse_changed, refuse_places
from smelt.listing import FAILED, REMOVED, WRITTEN, Listing, Row, record_digest
from smelt.prepared import Prepared, papers_of, write_papers
from smelt.preparing import check_numbers
from smelt.recipe.schema import Recipe
from smelt.recipe.settings import Plain
from smelt.recipe.sweeps import over_mapping, read_over
from smelt.scoring import Scorer
from smelt.storage import files
from smelt.storage.journal import Finished
from smelt.storage.leftovers import leftovers
from smelt.storage.locking import lock_folder
from smelt.storage.places import MARGIN, make_parents, unmake
from smelt.storage.signals import held
from smelt.storage.writer import Build, check_out
from smelt.writing import (
    Progress,
    Settings,
    carry_out_kept,
    check_steps,
    hashes_of,
    head_of,
    layout_of,
    nonfinite_of,
)

MOST_AT_ONCE = 32
"""Most outputs that are written side by side."""
_LOCK = ".smelt-sweep"
_KEYS, _COUNTS = 16 << 20, 512 << 10
"""Bytes that a cut of one tensor of one candidate takes: keys near it at most; counts, for each model."""
_BESIDE = 4
"""Files of an output that are open beside its weights: journal, lock, and a small one."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A candidate before anything is written: where it goes, its size, and whether it is there already."""

    name: str
    settings: Mapping[str, Plain]
    folder: Path
    bytes: int
    identity: str
    there: bool
    """Nothing is to be done for it: it is written, or was removed as not among the best."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep will do: bytes read in one run, and by merges one after the other; candidates per batch."""

    candidates: tuple[Planned, ...]
    batches: tuple[tuple[str, ...], ...]
    bytes_read: int
    apart_read: int
    bytes_written: int
    memory: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep did. `failed` and `unscored` hold the candidates that have no output, or no score, and why."""

    out: Path
    plan: SweepPlan
    rows: tuple[Row, ...]
    seconds: float = 0.0
    engine_seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    failed: Mapping[str, SmeltError] = field(default_factory=dict)
    unscored: Mapping[str, SmeltError] = field(default_factory=dict)
    ranking: tuple[str, ...] = ()
    """The names of scored candidates, the best first."""


def sweep_to(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    over: Mapping[str, Any] | Sequence[str],
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    score: str | None = None,
    lowest: bool = False,
    keep_best: int | None = None,
    allow: Iterable[str] = (),
    strict: bool = False,
    seed: int = 0,
    shard_bytes: int | None = None,
    workers: int | None = None,
    tile: int | None = None,
    device: str = CPU,
    memory: int | None = None,
    hash_inputs: bool = False,
    trust_methods: bool = False,
    trust_pickles: bool = False,
    keep_folder: str | Path | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[SweepPlan], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> SweepReport:
    """Write every candidate of a sweep into a folder of its own in `out`; `sweep.json` there lists them.

    `over` maps settings to values (`{"lambda": "0.2:1.2:0.2", "models.legal.weight": [0.3, 0.5]}`), or is a list of
    texts as the command line takes them. Each folder holds what `smelt.merge` of the candidate's recipe writes, byte
    for byte. Candidates that are there already are left. `score` is a command, run on each folder in place of `{}`; its
    last number is the candidate's score, `lowest` says that lower is better, and `keep_best` removes all but so many.
    `dry_run` ends before anything is written. The other settings are those of `smelt.merge`.

    A candidate whose numbers cannot be written, or whose score fails, is in the report, and the others go on. Raises
    RecipeError, InputError or StorageError; candidates that were finished before stay, and are left by the next run.
    """
    started = time.perf_counter()
    out = Path(os.path.realpath(out))
    check_numbers(shard_bytes=shard_bytes)
    if keep_best is not None and score is None:
        raise RecipeError("without scores no candidate is the best", fix="say how to score them: --score 'COMMAND {}'")
    if keep_best is not None and keep_best < 1:
        raise RecipeError(f"at least 1 candidate is to be kept, not {keep_best}", fix="leave it out to keep all")
    scorer = None if score is None else Scorer.of(score, lowest=lowest)
    overs = over_mapping(over) if isinstance(over, Mapping) else read_over([over] if isinstance(over, str) else over)
    planning = planning_of(
        allow,
        keep_folder=Path(keep_folder) if keep_folder is not None else out.parent / keeping.FOLDER,
        strict=strict,
        seed=seed,
        workers=workers,
        tile=tile,
        device=device,
        memory=memory,
    )
    with open_candidates(
        recipe, overs, planning=planning, trust_methods=trust_methods, trust_pickles=trust_pickles
    ) as candidates:
        settings = Settings(
            backend=choose(device),
            allowed=planning.allow,
            strict=strict,
            shard_bytes=shard_bytes,
            resume=resume,
            hash_inputs=hash_inputs,
            progress=progress,
            on_note=on_note,
        )
        sweep = _Sweep(candidates, out, settings, overwrite=overwrite, scorer=scorer, keep_best=keep_best)
        plan = sweep.plan(recipe)
        if on_plan is not None:
            on_plan(plan)
        if dry_run:
            return SweepReport(out, plan, ())
        report = sweep.carry_out(plan)
    return replace(report, seconds=time.perf_counter() - started)


class _Sweep:
    """One sweep on its way."""

    def __init__(
        self,
        candidates: Candidates,
        out: Path,
        settings: Settings,
        *,
        overwrite: bool,
        scorer: Scorer | None,
        keep_best: int | None,
    ) -> None:
        self._candidates = candidates
        self._out = out
        self._settings = settings
        self._overwrite = overwrite
        self._scorer = scorer
        self._keep_best = keep_best
        self._listing = Listing(out, {})
        self._names = [variant.name for variant in candidates.variants]
        self._failed: dict[str, SmeltError] = {}
        self._unscored: dict[str, SmeltError] = {}
        self._engine_seconds = 0.0
        self._read = self._written = 0

    # --- before anything is written -----------------------------------------------------------------------------

    def plan(self, recipe: object) -> SweepPlan:
        """Plan every candidate, and check all that can be known before anything is written."""
        if files.kind(self._out) not in (None, "folder"):
            raise StorageError("the output exists and is not a folder", where=[str(self._out)], fix="choose another")
        self._listing = Listing.read(self._out)
        found: dict[str, Planned] = {}
        batches: list[tuple[str, ...]] = []
        problems: list[SmeltError] = []
        warnings: dict[str, None] = {}
        read = apart = memory = 0
        for family in self._candidates.families():
            waiting: list[tuple[str, Forecast, Prepared]] = []
            size = 0
            for number in family:
                prepared = self._candidates.prepared(number)
                variant = self._candidates.variants[number]
                if number == family[0]:
                    check_steps(prepared, self._settings.shard_bytes)
                    check_equal(prepared.plan, [model.source for model in prepared.models])
                    inputs = inputs_of(recipe, prepared)
                    size = self._at_once(prepared)
                one = self._planned(variant.name, variant.settings, prepared)
                found[variant.name] = one
                warnings.update(dict.fromkeys(prepared.plan.warnings))
                if not one.there:
                    problems += self._unusable(one, prepared, inputs)
                    waiting.append((variant.name, prepared.forecast, prepared))
                if waiting and (len(waiting) == size or number == family[-1]):
                    batches.append(tuple(name for name, _, _ in waiting))
                    costs = [cost for _, cost, _ in waiting]
                    plans = [each.plan for _, _, each in waiting]
                    apart += sum(cost.bytes_read for cost in costs)
                    together = bytes_together(plans, keep_bytes=costs[0].keep_bytes)
                    read += costs[0].bytes_read if prepared.steps else together
                    memory = max(memory, costs[0].memory + _further(prepared, costs[0]) * (len(waiting) - 1))
                    waiting = []
        raise_all(problems)
        ordered = tuple(found[name] for name in self._names)
        todo = [one for one in ordered if not one.there]
        self._check_space(todo)
        written = sum(one.bytes for one in todo)
        return SweepPlan(ordered, tuple(batches), read, apart, written, memory, tuple(warnings))

    def _planned(self, name: str, settings: Mapping[str, Plain], prepared: Prepared) -> Planned:
        shards = layout_of(prepared, self._settings.shard_bytes)
        head = head_of(prepared, shards, papers_of(prepared, name=name), settings=self._settings)
        extra = {"device": self._settings.backend.described(), "hashes": self._settings.hash_inputs}
        text = json.dumps({**head, **extra}, sort_keys=True, ensure_ascii=False)
        identity = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        there = self._listing.is_there(name, identity) or self._was_removed(name, identity)
        return Planned(name, settings, self._out / name, shards.total_bytes, identity, there)

    def _was_removed(self, name: str, identity: str) -> bool:
        """Whether an earlier run of this sweep has written and scored a candidate, and found others better."""
        row, listing = self._listing.rows.get(name), self._listing
        if row is None or row.state != REMOVED or row.identity != identity or self._scorer is None:
            return False
        same = (listing.scored_by, listing.lowest) == (self._scorer.command, self._scorer.lowest)
        return same and None not in (self._keep_best, listing.keep_best) and self._keep_best <= listing.keep_best  # type: ignore[operator]

    def _unusable(self, one: Planned, prepared: Prepared, inputs: Sequence[Path]) -> list[SmeltError]:
        """Why a candidate cannot be written to its place."""
        try:
            refuse_places(one.folder, inputs, prepared.kept)
            check_out(one.folder, overwrite=self._overwrite)
        except StorageError as error:
            return [error]
        return []

    def _at_once(self, prepared: Prepared) -> int:
        """How many candidates are written side by side: as files and memory allow, and no more than MOST_AT_ONCE."""
        open_files = len(layout_of(prepared, self._settings.shard_bytes).shards) + _BESIDE
        most = min(MOST_AT_ONCE, _descriptors() // 2 // open_files)
        if (limit := self._candidates.planning.memory) is not None:
            cost = prepared.forecast
            most = min(most, 1 + (limit - cost.memory) // max(_further(prepared, cost), 1))
        return max(1, most)

    def _check_space(self, todo: Sequence[Planned]) -> None:
        """Raise StorageError unless the disk has room for all candidates, unfinished ones' own room counted."""
        if not todo:
            return
        folder = self._out
        there: dict[Path, int] = {}
        if files.kind(folder) == "folder":
            there = {left.out: left.bytes for left in leftovers(folder)}
        while files.kind(folder) is None:
            folder = folder.parent
        needed = sum(max(one.bytes - there.get(one.folder, 0), 0) + MARGIN for one in todo)
        free = files.free_bytes(folder)
        if free < needed:
            count = "1 candidate needs" if len(todo) == 1 else f"{len(todo)} candidates need"
            raise StorageError(
                f"not enough space: {count} {files.size_text(needed)}, {files.size_text(free)} free",
                where=[str(folder)],
                fix=f"free {files.size_text(needed - free)}, choose another disk, or sweep over fewer values",
            )

    # --- writing ------------------------------------------------------------------------------------------------

    def carry_out(self, plan: SweepPlan) -> SweepReport:
        """Write, score and list all candidates."""
        made = make_parents(self._out / "candidate")
        lock = None
        before = None
        try:
            lock = lock_folder(self._out / _LOCK)
            listing = Listing.read(self._out)
            before = replace(listing, rows=dict(listing.rows))
            self._listing = listing
            self._enter(plan)
            known: dict[int, Known] = {}
            self._score([one.name for one in plan.candidates if one.there])
            for batch in plan.batches:
                family = next(i for i, f in enumerate(self._candidates.families()) if self._names.index(batch[0]) in f)
                self._write(batch, plan, known.setdefault(family, Known()))
                self._score(batch)
            ranking = self._ranking()
            self._prune(ranking)
        except BaseException as error:
            with held():
                self._end_after(error, before, made)
            raise
        finally:
            if lock is not None:
                lock.release()
                if made and files.kind(self._out) == "folder" and files.is_empty_folder(self._out):
                    unmake(made)
        rows = tuple(listing.rows[name] for name in self._names)
        return SweepReport(
            self._out,
            plan,
            rows,
            engine_seconds=self._engine_seconds,
            bytes_read=self._read,
            bytes_written=self._written,
            failed=self._failed,
            unscored=self._unscored,
            ranking=tuple(ranking),
        )

    def _enter(self, plan: SweepPlan) -> None:
        """Write down what will be there, before it is."""
        listing = self._listing
        scorer = self._scorer
        if scorer is not None and (listing.scored_by, listing.lowest) != (scorer.command, scorer.lowest):
            listing.rows = {name: replace(row, scores={}) for name, row in listing.rows.items()}
            listing.scored_by, listing.lowest = scorer.command, scorer.lowest
        listing.keep_best = self._keep_best
        ours: dict[str, Row] = {}
        for one in plan.candidates:
            row = listing.rows.pop(one.name, None)
            if one.there and row is not None:
                digest = record_digest(one.folder)
                state = REMOVED if digest is None else WRITTEN
                ours[one.name] = replace(
                    row, settings=one.settings, state=state, digest=row.digest or digest, error=None
                )
            else:
                ours[one.name] = Row(one.name, one.settings, one.identity, replaces=record_digest(one.folder))
        listing.rows = ours | listing.rows
        listing.write()

    def _write(self, names: Sequence[str], plan: SweepPlan, known: Known) -> None:
        """Write a batch of candidates of one family, side by side."""
        settings = self._settings
        all_prepared = [self._candidates.prepared(self._names.index(name)) for name in names]
        first = all_prepared[0]
        stored = list(self._candidates.stored.values())
        with ExitStack() as stack:
            kept_runs = carry_out_kept(first, stack, settings=settings)
            builds = []
            papers = []
            layouts = [layout_of(prepared, settings.shard_bytes) for prepared in all_prepared]
            sources, weights = [model.source for model in first.models], [model.source for model in stored]
            written = sum(shards.total_bytes for shards in layouts)
            stream = Stream(first.plan, sources, weights, written=written, outputs=len(names))
            for name, prepared, shards in zip(names, all_prepared, layouts, strict=True):
                papers.append(papers_of(prepared, name=name))
                head = head_of(prepared, shards, papers[-1], settings=settings)
                place = self._out / name
                start = Build.start(
                    place, shards, overwrite=self._overwrite, head=head, resume=settings.resume, stream=stream.needed
                )
                builds.append(stack.enter_context(start))
            self._say_begun(builds)
            cost = first.forecast

            def finished(number: int, tensor: TensorResult) -> None:
                builds[number].finished(Finished(*_fields(tensor)))
                stream.finished(tensor.name)

            try:
                done = run_variants(
                    [prepared.plan for prepared in all_prepared],
                    sources,
                    builds,
                    workers=cost.workers,
                    tile=cost.tile,
                    allow_nonfinite="nonfinite" in settings.allowed | frozenset(first.recipe.allow),
                    kernels=cost.kernels or None,
                    backend=settings.backend,
                    keep_bytes=cost.keep_bytes,
                    done=[{t.name: TensorResult(*_fields(t)) for t in build.resumed} for build in builds],
                    known=known,
                    on_tensor=finished,
                    progress=settings.progress,
                )
            except NumericError as error:  # of all of them: what each of them lacks is said of the first
                self._fail(names, builds, error)
                return
            except BaseException:
                for model in stored:
                    model.source.close()  # where descriptors ran out, removing the builds needs some of theirs
                raise
            hashes = hashes_of(first, settings=settings)
            refuse_changed(first.opened.values())
            self._engine_seconds += done.seconds
            self._read += done.bytes_read + sum(run.bytes_read for run in kept_runs)
            for number, (name, build, prepared) in enumerate(zip(names, builds, all_prepared, strict=True)):
                failure = done.failed.get(number)
                if failure is None:
                    try:
                        nonfinite_of(done.tensors[number], strict=settings.strict)
                    except NumericError as error:
                        failure = error
                if failure is not None:
                    self._fail([name], [build], failure)
                    continue
                device = settings.backend.described()
                tensors, paper = done.tensors[number], papers[number]
                write_papers(build, prepared, tensors, paper, hashes=hashes, claims={}, device=device)
                build.commit()
                self._written += build.layout.total_bytes
                self._listing.put(name, state=WRITTEN, digest=record_digest(self._out / name), replaces=None)
        if any(not kept.there for kept in first.kept.values()):
            self._candidates.renew()

    def _say_begun(self, builds: Sequence[Build]) -> None:
        note = self._settings.on_note
        resumed = sum(len(build.resumed) for build in builds)
        if note is not None and resumed:
            total = sum(len(shard.tensors) for build in builds for shard in build.layout.shards)
            note(f"resuming: {resumed} of {total} tensors were finished, and are as they were written")
        elif note is not None and any(build.discarded for build in builds):
            note("the unfinished output of an earlier run was removed")

    def _fail(self, names: Sequence[str], builds: Sequence[Build], error: SmeltError) -> None:
        """Give up candidates whose numbers cannot be written."""
        for name, build in zip(names, builds, strict=True):
            build.abandon()
            self._failed[name] = of_candidate(error, name)
            self._listing.put(name, state=FAILED, error=error.message)

    def _end_after(self, error: BaseException, before: Listing | None, made: list[Path]) -> None:
        """Leave the folder as it is of use: with what is finished, or as it was before."""
        rows = [self._listing.rows[name] for name in self._names if name in self._listing.rows]
        finished = sum(row.state in (WRITTEN, REMOVED) for row in rows)
        unfinished = bool(getattr(error, "__notes__", []))
        try:
            if before is not None and not finished and not unfinished:
                if before.rows:
                    before.write()
                else:
                    before.remove()
                return
        except StorageError:
            return
        if finished or unfinished:
            said = [f"{finished} of {len(self._names)} candidates are finished and stay: run again to go on"]
            if unfinished:
                said.append("what is finished of others is kept: --resume goes on with it, `smelt clean` removes it")
            error.__notes__ = said

    # --- scores -------------------------------------------------------------------------------------------------

    def _score(self, names: Iterable[str]) -> None:
        """Score those of the candidates that are written and have no score yet."""
        for name in names:
            row = self._listing.rows[name]
            if self._scorer is None or row.state != WRITTEN or row.scores:
                continue
            try:
                scores = self._scorer.score(self._out / name)
            except (InputError, StorageError) as error:
                self._unscored[name] = of_candidate(error, name)
                self._listing.put(name, error=error.message)
                continue
            self._listing.put(name, scores=scores, error=None)

    def _ranking(self) -> list[str]:
        if self._scorer is None:
            return []
        rows = [self._listing.rows[name] for name in self._names]
        return self._scorer.rank({row.name: row.scores for row in rows if row.scores})

    def _prune(self, ranking: Sequence[str]) -> None:
        """Remove the candidates beyond the best; those without a score stay."""
        if self._keep_best is None:
            return
        for name in ranking[self._keep_best :]:
            if self._listing.rows[name].state == WRITTEN:
                self._listing.put(name, state=REMOVED)
                files.remove_tree(self._out / name)


def _fields(tensor: Any) -> tuple[str, str, int, int]:
    return tensor.name, tensor.digest, tensor.inherited, tensor.created


def _further(prepared: Prepared, cost: Forecast) -> int:
    """Bytes of memory that each further candidate of a batch takes, at most."""
    entries = prepared.plan.entries
    largest = max((entry.input_bytes for entry in entries if cost.passes[entry.name] > 1), default=0)
    reducing = min(largest, _KEYS) + _COUNTS * len(prepared.models) if largest else 0
    return 2 * PER_ENTRY * len(entries) + cost.workers * reducing


def _descriptors() -> int:
    """How many files this process may have open."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 16 if soft == resource.RLIM_INFINITY else soft
