"""The one place that strings parse, plan, run, record and commit together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from smelt import keeping
from smelt.engine.backends import CPU, Backend, check_name, choose
from smelt.engine.copying import Known
from smelt.engine.forecast import Within, forecast, within
from smelt.engine.inputs import lies_in_files
from smelt.engine.nesting import Step, further_models, open_steps, with_steps
from smelt.engine.run import check_equal, run
from smelt.engine.streaming import Stream
from smelt.engine.tensor import TensorResult
from smelt.errors import NumericError, RecipeError, raise_all
from smelt.guarding import beside_models, inputs_of, refuse_changed, refuse_places, unusable
from smelt.keeping import Kept
from smelt.lineage.identity import identity
from smelt.lineage.trusted import Claim, trusted
from smelt.methods.loading import MethodFile, load_file
from smelt.planning.build import build
from smelt.planning.check import check
from smelt.planning.companions import metadata, weight_stem
from smelt.planning.entries import Plan
from smelt.planning.locate import Model, clashes, local_folders, missing_folders, open_models
from smelt.prepared import Prepared, papers_of, write_papers
from smelt.recipe.check import check_parameters
from smelt.recipe.nesting import mentions
from smelt.recipe.parse import from_dict, load
from smelt.recipe.schema import Recipe, Relaxation
from smelt.specs import TensorSpec
from smelt.storage import digests, files
from smelt.storage.checkpoint import Checkpoint, TensorSource
from smelt.storage.journal import Finished
from smelt.storage.writer import Build, Layout, OutputTensor, layout

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in one weight file, unless asked otherwise, or the model is one file without a config."""
ALLOWED = get_args(Relaxation)
"""What `allow` may relax."""

_ON_DEVICE = "worked out on the device {}: numbers may differ in the last place from those of a merge on the CPU"
_REPAIR = "repair or drop the models that hold them, or leave --strict out"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did. `seconds` is the whole call.

    Of these, `engine_seconds` went into laying out the output, reading, working on and writing tensors, and
    `commit_seconds` into making the output durable. `resumed` counts the tensors that an interrupted run had written.
    """

    out: Path
    plan: Plan
    seconds: float
    engine_seconds: float
    commit_seconds: float
    bytes_read: int
    bytes_written: int
    nonfinite: Mapping[str, int]
    warnings: tuple[str, ...]
    trusted: tuple[str, ...] = ()
    """Tensors that were moved unread, with the digest that their model's record names."""
    resumed: int = 0
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """Merges within the recipe that are kept: where, and whether they were there before."""


@contextmanager
def prepare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    allow: Iterable[str] = (),
    strict: bool = False,
    seed: int = 0,
    workers: int | None = None,
    tile: int | None = None,
    device: str = CPU,
    memory: int | None = None,
    trust_methods: bool = False,
    trust_pickles: bool = False,
    weights: bool = True,
    out: Path | None = None,
    overwrite: bool = False,
    keep_folder: Path | None = None,
    change: Callable[[Recipe], Recipe] | None = None,
) -> Iterator[Prepared]:
    """Parse, open and plan; the models are closed when the context ends.

    `recipe` is a path, a mapping or a Recipe. `strict` makes warnings errors. `memory` (bytes) cuts threads and buffers
    until the predicted peak is below it. With `weights` false, no weights are downloaded: the headers of a model on the
    hub are enough for a plan. Where the merge is to write into `out`, an `out` that cannot be is told before any model
    is opened, with the models that are not there. In `keep_folder` the merges are looked for that the recipe keeps:
    beside `out`, or in the working folder, unless it is given. `change` gives the recipe that is meant for the one that
    was read, before it is checked. Raises RecipeError, InputError or StorageError with
    every problem that was found.
    """
    allowed = allowances(allow)
    check_numbers(workers=workers, tile=tile, memory=memory)
    check_name(device)
    beside = path = None
    if isinstance(recipe, str | Path):
        path = Path(recipe)
        recipe = load(path)
        beside = Path(os.path.realpath(path)).parent
    elif not isinstance(recipe, Recipe):
        recipe = from_dict(recipe)
    with ExitStack() as stack:
        method_files = _load_methods(recipe, beside or Path.cwd(), stack, trust=trust_methods)
        recipe = recipe if change is None else change(recipe)
        problems = check_parameters(recipe)
        problems += clashes({name: recipe.where("merges", name) for name in recipe.merges or {}}, beside=beside)
        named = mentions(recipe)
        if problems:  # then nothing is fetched, but what is surely missing is told too
            raise_all([*problems, *missing_folders(named, beside=beside)])
        if out is not None:
            known = [*local_folders(named, beside=beside), *beside_models(path, method_files)]
            if problems := unusable(out, overwrite, known):
                raise_all([*problems, *missing_folders(named, beside=beside)])
        opened = open_models(
            named,
            beside=beside,
            stack=stack,
            weights=weights,
            trust_pickles=trust_pickles,
            merges=tuple(recipe.merges or ()),
        )
        opened, steps = open_steps(recipe, opened, allow=allowed, seed=seed)
        place = keep_folder or (Path(os.path.realpath(out)).parent if out is not None else Path()) / keeping.FOLDER
        kept = keeping.look(steps, opened, place, allow=allowed, device=device, method_files=method_files)
        yield planned(
            recipe,
            opened,
            steps,
            kept=kept,
            method_files=method_files,
            allow=allowed,
            strict=strict,
            seed=seed,
            workers=workers,
            tile=tile,
            device=device,
            memory=memory,
        )


def planned(
    recipe: Recipe,
    opened: Mapping[str, Model],
    steps: tuple[Step, ...],
    *,
    kept: Mapping[str, Kept],
    method_files: Mapping[str, str],
    allow: frozenset[str],
    strict: bool,
    seed: int,
    workers: int | None,
    tile: int | None,
    device: str,
    memory: int | None,
) -> Prepared:
    """The plan of a checked recipe over its opened models and merges, and what it will cost. Raises as `prepare`."""
    plan = with_steps(build(recipe, opened, allow=allow, seed=seed), recipe, steps)
    if device != CPU:
        plan = replace(plan, notes=(*plan.notes, _ON_DEVICE.format(device)))
    models = tuple({id(opened[name.text]): opened[name.text] for name in recipe.model_names()}.values())
    if strict and plan.warnings:
        raise RecipeError(_strictly(len(plan.warnings)), where=list(plan.warnings))
    tokenizer = next(model for model in opened.values() if model.name == plan.tokenizer)
    within_it = Within({step.name: step.plan for step in steps}, {name: one.there for name, one in kept.items()})
    placed = {model.name for model in opened.values() if lies_in_files(model.source)}
    in_files = {i for i, model in enumerate(plan.models) if model.published in placed}
    if memory is None:
        cost = forecast(plan, workers=workers, tile=tile, device=device, merges=within_it, in_files=in_files)
    else:
        cost = within(memory, plan, workers=workers, tile=tile, device=device, merges=within_it, in_files=in_files)
    return Prepared(recipe, opened, models, tokenizer, plan, cost, method_files, steps, kept)


def allowances(allow: Iterable[str]) -> frozenset[str]:
    """The words to allow, checked. Raises RecipeError."""
    allowed = frozenset([allow] if isinstance(allow, str) else allow)
    if unknown := sorted(allowed - set(ALLOWED)):
        raise RecipeError(f"unknown word to allow: {', '.join(unknown)}", fix=f"known are {', '.join(ALLOWED)}")
    return allowed


def check_numbers(**numbers: int | None) -> None:
    """Numbers that must be 1 or more where they are given. Raises RecipeError."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise RecipeError(f"{_SAID[name]} must be at least 1, not {number}", fix="leave it out for the default")


_SAID = {
    "workers": "the number of threads",
    "tile": "the tile size",
    "memory": "the memory",
    "shard_bytes": "the shard size",
}


def _strictly(count: int) -> str:
    return (
        "a warning, and --strict makes it an error"
        if count == 1
        else f"{count} warnings, and --strict makes them errors"
    )


def _load_methods(recipe: Recipe, folder: Path, stack: ExitStack, *, trust: bool) -> dict[str, str]:
    """Load the method files that a recipe names: code, so only if the user trusts it. Gives the sha256 of each.

    Their methods are forgotten when `stack` ends.
    """
    if recipe.methods and not trust:
        raise RecipeError(
            f"the recipe names a method file, which is code: {', '.join(recipe.methods)}",
            where=recipe.where("methods"),
            fix="read the file, and pass --trust-methods (trust_methods=True) if you trust it",
        )
    loaded: dict[Path, MethodFile] = {}
    for file in recipe.methods:
        path = (folder / file).resolve()
        if path not in loaded:
            loaded[path] = load_file(path)
            stack.callback(loaded[path].unload)
    return {file: loaded[(folder / file).resolve()].sha256 for file in recipe.methods}


def plan(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    allow: Iterable[str] = (),
    seed: int = 0,
    trust_methods: bool = False,
    trust_pickles: bool = False,
) -> Plan:
    """What a merge of this recipe would do, from headers and configs alone. Raises as `merge` does."""
    with prepare(
        recipe, allow=allow, seed=seed, trust_methods=trust_methods, trust_pickles=trust_pickles, weights=False
    ) as prepared:
        return prepared.plan


def merge(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
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
    trust_digests: bool = False,
    trust_pickles: bool = False,
    keep_folder: str | Path | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[Prepared], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> MergeReport:
    """Merge models as a recipe says, into the folder `out`, which appears whole or not at all.

    `allow` relaxes checks by name (`extra_tensor`, `missing_tensor`, `nonfinite`, `vocabulary`); `strict` makes
    warnings errors; `seed` drives the random methods; `workers` (threads) and `tile` (elements) change the speed, never
    the result, and so does `memory`, the most bytes the process may take; `device` is where methods work, `cpu` or with
    torch `cuda` (`cuda:1`), where numbers may differ in the last place; `hash_inputs` records the sha256 of every input
    file; `trust_methods` lets the recipe load method files, which are code; `trust_digests` copies tensors that stay as
    they are unread, with the digests that the `smelt.json` of their model names; `trust_pickles` has torch read models
    that are stored as pickles, in a process apart. `resume` goes on where an earlier run of this merge was cut off, and
    leaves what is finished if it is interrupted itself. `shard_bytes` is the most bytes of tensors in one file; without
    it 5 GB, but a state dict of one file stays one. `keep_folder` is where merges lie that the recipe keeps
    (`.smelt-kept` beside `out`). `progress` is called with (bytes done, bytes in all), `on_plan`
    once before anything is written, `on_note` with what is worth telling meanwhile.

    Raises RecipeError, InputError, StorageError or NumericError, after which `out` is what it was before.
    """
    started = time.perf_counter()
    out = Path(out)
    allowed = allowances(allow)
    check_numbers(shard_bytes=shard_bytes)
    with (
        prepare(
            recipe,
            allow=allowed,
            strict=strict,
            seed=seed,
            workers=workers,
            tile=tile,
            device=device,
            memory=memory,
            trust_methods=trust_methods,
            trust_pickles=trust_pickles,
            out=out,
            overwrite=overwrite,
            keep_folder=None if keep_folder is None else Path(keep_folder),
        ) as prepared,
        ExitStack() as stack,
    ):
        backend = choose(device)
        plan, models = prepared.plan, prepared.models
        refuse_places(out, inputs_of(recipe, prepared), prepared.kept)
        shards = layout_of(prepared, shard_bytes)
        sources = [model.source for model in models]
        check_steps(prepared, shard_bytes)
        check_equal(plan, sources)
        claims, doubts = trusted(plan, sources) if trust_digests else ({}, [])
        if strict and doubts:
            raise RecipeError(_strictly(len(doubts)), where=doubts)
        papers = papers_of(prepared, name=Path(os.path.realpath(out)).name)
        if on_plan is not None:
            on_plan(prepared)
        settings = Settings(
            backend=backend,
            allowed=allowed,
            strict=strict,
            shard_bytes=shard_bytes,
            resume=resume,
            hash_inputs=hash_inputs,
            progress=progress,
            on_note=on_note,
        )
        try:
            runs = carry_out_kept(prepared, stack, settings=settings)
            done = _carry_out(prepared, out, shards, papers, settings=settings, overwrite=overwrite, claims=claims)
        except BaseException as error:
            _say_kept(error, prepared)
            raise
        runs.append(done)
    return MergeReport(
        out=out,
        plan=plan,
        seconds=time.perf_counter() - started,
        engine_seconds=sum(one.engine_seconds for one in runs),
        commit_seconds=sum(one.commit_seconds for one in runs),
        bytes_read=sum(one.bytes_read for one in runs),
        bytes_written=sum(one.bytes_written for one in runs),
        nonfinite=done.nonfinite,
        warnings=(*plan.warnings, *doubts, *nonfinite_warnings(done.nonfinite)),
        trusted=tuple(claims),
        resumed=done.resumed,
        kept=prepared.kept,
    )


def layout_of(prepared: Prepared, shard_bytes: int | None) -> Layout:
    """Where the output's tensors will lie, with the plan's laws checked."""
    plan, models = prepared.plan, prepared.models
    shards = _layout(plan, _stored_donor(plan, models, prepared.steps), shard_bytes)
    check(plan, models, shards)
    return shards


def check_steps(prepared: Prepared, shard_bytes: int | None) -> None:
    """Check the plans of the merges within the recipe, and that their tensors which cannot be averaged are equal."""
    for step in prepared.steps:
        check(step.plan, step.models, _step_layout(step, prepared.steps, shard_bytes))
        check_equal(step.plan, step.source.sources)


@dataclass(frozen=True, slots=True)
class Settings:
    """What writing one checkpoint is told, that of the output as those of merges that are kept."""

    backend: Backend
    allowed: frozenset[str]
    strict: bool
    shard_bytes: int | None
    resume: bool
    hash_inputs: bool
    progress: Progress | None
    on_note: Callable[[str], None] | None


@dataclass(frozen=True, slots=True)
class Done:
    """What writing one checkpoint took, and what was found on the way."""

    engine_seconds: float
    commit_seconds: float
    bytes_read: int
    bytes_written: int
    nonfinite: Mapping[str, int]
    resumed: int


def carry_out_kept(prepared: Prepared, stack: ExitStack, *, settings: Settings) -> list[Done]:
    """Write the merges of the recipe that are to be kept and are not there, and have all of them read from there."""
    runs = []
    for step in prepared.steps:
        kept = prepared.kept.get(step.name)
        if kept is None:
            continue
        if not kept.there:
            runs.append(_carry_out_step(step, prepared, kept.folder, settings=settings))
        keeping.read_kept(step, kept.folder, stack)
    return runs


def _say_kept(error: BaseException, prepared: Prepared) -> None:
    """Add to what ended a run which merges it has made and kept before: they stay."""
    for step in prepared.steps:
        kept = prepared.kept.get(step.name)
        if kept is not None and not kept.there and not step.source.computed:
            error.add_note(f"the merge `{step.name}` is finished, and kept in {kept.folder}")


def _carry_out_step(step: Step, prepared: Prepared, folder: Path, *, settings: Settings) -> Done:
    """Write a merge of the recipe that is kept, as one by itself."""
    names = {text: model.name for text, model in prepared.opened.items()}
    one = keeping.by_itself(step, prepared.recipe, prepared.steps, names)
    alone = replace(
        prepared, recipe=one.recipe, plan=one.plan, models=step.models, tokenizer=step.tokenizer, steps=one.steps
    )
    papers = papers_of(alone, name=step.name)
    shards = _step_layout(step, prepared.steps, settings.shard_bytes)
    note = settings.on_note
    if note is not None:
        settings = replace(settings, on_note=lambda line: note(f"in the merge `{step.name}`: {line}"))
    return _carry_out(alone, folder, shards, papers, settings=settings, overwrite=True)


def _carry_out(
    prepared: Prepared,
    out: Path,
    shards: Layout,
    papers: Mapping[str, bytes],
    *,
    settings: Settings,
    overwrite: bool,
    claims: Mapping[str, Claim] | None = None,
) -> Done:
    """Run a plan and write what it gives, whole or not at all."""
    plan, models, cost = prepared.plan, prepared.models, prepared.forecast
    sources = [model.source for model in models]
    stored = [*models, *further_models(models, prepared.steps)]
    claims = claims or {}
    allowed = settings.allowed | frozenset(prepared.recipe.allow)
    head = head_of(prepared, shards, papers, settings=settings)
    stream = Stream(plan, sources, [model.source for model in stored], written=shards.total_bytes)
    started = time.perf_counter()
    with Build.start(
        out, shards, overwrite=overwrite, head=head, resume=settings.resume, stream=stream.needed
    ) as folder:
        if settings.on_note is not None:
            for line in _begun(folder, len(plan.entries)):
                settings.on_note(line)

        def finished(tensor: TensorResult) -> None:
            folder.finished(Finished(tensor.name, tensor.digest, tensor.inherited, tensor.created))
            stream.finished(tensor.name)

        try:
            done = run(
                plan,
                sources,
                folder,
                workers=cost.workers,
                tile=cost.tile,
                allow_nonfinite="nonfinite" in allowed,
                backend=settings.backend,
                known=_known(plan, sources, folder, claims),
                kernels=cost.kernels,
                keep_bytes=cost.keep_bytes,
                done={t.name: TensorResult(t.name, t.digest, t.inherited, t.created) for t in folder.resumed},
                on_tensor=finished,
                progress=settings.progress,
            )
        except BaseException:
            for model in stored:
                model.source.close()  # where descriptors ran out, removing the build needs some of theirs
            raise
        engine_seconds = time.perf_counter() - started
        hashes = hashes_of(prepared, settings=settings)
        refuse_changed(prepared.opened.values())
        nonfinite = nonfinite_of(done.tensors, strict=settings.strict)
        device = settings.backend.described()
        write_papers(folder, prepared, done.tensors, papers, hashes=hashes, claims=claims, device=device)
        committing = time.perf_counter()
        folder.commit()
        commit_seconds = time.perf_counter() - committing
    written = shards.total_bytes
    return Done(engine_seconds, commit_seconds, done.bytes_read, written, nonfinite, len(folder.resumed))


def head_of(prepared: Prepared, shards: Layout, papers: Mapping[str, bytes], *, settings: Settings) -> dict[str, Any]:
    """The head of the output's journal: what merge it is."""
    return identity(
        prepared.plan,
        shards,
        inputs=[model.source.files for model in prepared.models],
        merges={step.name: (step.plan, [model.source.files for model in step.models]) for step in prepared.steps},
        allow=settings.allowed | frozenset(prepared.recipe.allow),
        shard_bytes=settings.shard_bytes or SHARD_BYTES,
        companions=papers,
        method_files=prepared.method_files,
    )


def hashes_of(prepared: Prepared, *, settings: Settings) -> dict[tuple[int, str], str]:
    """The sha256 of each (model, file) for the record, where it is known or asked for."""
    return {
        (index, info.name): known
        for index, model in enumerate([*prepared.models, *further_models(prepared.models, prepared.steps)])
        for info in model.source.files
        if (known := info.blob_sha256 or (_sha256(info.path) if settings.hash_inputs else None))
    }


def nonfinite_of(tensors: Iterable[TensorResult], *, strict: bool) -> dict[str, int]:
    """The tensors with numbers that are not finite, and how many. Raises NumericError where `strict` and any."""
    nonfinite = {r.name: r.inherited + r.created for r in tensors if r.inherited + r.created}
    if strict and nonfinite:
        raise NumericError(_strictly(1), where=nonfinite_warnings(nonfinite), fix=_REPAIR)
    return nonfinite


def _layout(plan: Plan, donor: Model, shard_bytes: int | None) -> Layout:
    """Where the output's tensors lie: in files of 5 GB, but a state dict that was one file stays one."""
    if shard_bytes is None:
        state_dict = donor.config is None and len(donor.source.files) == 1
        shard_bytes = max(plan.output_bytes, 1) if state_dict else SHARD_BYTES
    tensors = [OutputTensor(entry.name, entry.dtype, entry.shape) for entry in plan.entries]
    return layout(tensors, shard_bytes=shard_bytes, metadata=metadata(donor), stem=weight_stem(donor))


def _step_layout(step: Step, steps: Sequence[Step], shard_bytes: int | None) -> Layout:
    return _layout(step.plan, _stored_donor(step.plan, step.models, steps), shard_bytes)


def _stored_donor(plan: Plan, models: Sequence[Model], steps: Sequence[Step]) -> Model:
    """The model whose files the output is laid out like: a donor that is a merge of the recipe follows its own."""
    by_name = {step.name: step for step in steps}
    donor = models[plan.donor]
    while donor.planned.merged:
        step = by_name[donor.planned.published]
        donor = step.models[step.plan.donor]
    return donor


def _known(plan: Plan, sources: Sequence[TensorSource], folder: Build, claims: Mapping[str, Claim]) -> dict[str, Known]:
    """For tensors whose digest is trusted: that digest, and how their bytes get into the build."""
    known = {}
    for entry in plan.entries:
        if (claim := claims.get(entry.name)) is not None:
            tensor = entry.inputs[0].tensor
            source = sources[entry.inputs[0].model]
            assert isinstance(source, Checkpoint)
            move = partial(_move, folder, entry.name, source, tensor)
            known[entry.name] = Known(claim.digest, claim.nonfinite, move)
    return known


def _move(folder: Build, name: str, source: Checkpoint, tensor: TensorSpec, start: int, stop: int) -> None:
    folder.take(name, start, stop, source=source.file_of(tensor), offset=tensor.offset + start)


def _begun(folder: Build, total: int) -> list[str]:
    """What is worth telling of an earlier run's unfinished output."""
    if folder.resumed:
        return [f"resuming: {len(folder.resumed)} of {total} tensors were finished, and are as they were written"]
    if folder.discarded:
        return ["the unfinished output of an earlier run was removed"]
    return []


def _sha256(path: Path) -> str:
    with files.open_read(path) as file:
        return digests.sha256(file)


def nonfinite_warnings(nonfinite: Mapping[str, int]) -> list[str]:
    if not nonfinite:
        return []
    total = sum(nonfinite.values())
    shown = ", ".join(f"{name} ({count})" for name, count in list(nonfinite.items())[:3])
    numbers = "1 number of the output is" if total == 1 else f"{total} numbers of the output are"
    tensors = "1 tensor" if len(nonfinite) == 1 else f"{len(nonfinite)} tensors"
    return [f"{numbers} NaN or infinite, in {tensors}: {shown}"]
