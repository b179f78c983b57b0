"""Carrying a plan out: run it and write what it gives, with its papers, whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smelt import keeping
from smelt.engine.backends import Backend
from smelt.engine.copying import Known
from smelt.engine.nesting import Step, further_models
from smelt.engine.run import check_equal, run
from smelt.engine.streaming import Stream
from smelt.engine.tensor import TensorResult
from smelt.errors import NumericError
from smelt.guarding import refuse_changed
from smelt.lineage.identity import identity
from smelt.lineage.trusted import Claim
from smelt.planning.check import check
from smelt.planning.companions import metadata, weight_stem
from smelt.planning.entries import Plan
from smelt.planning.locate import Model
from smelt.prepared import Prepared, papers_of, write_papers
from smelt.preparing import strictly
from smelt.specs import TensorSpec
from smelt.storage import digests, files
from smelt.storage.checkpoint import Checkpoint, TensorSource
from smelt.storage.journal import Finished
from smelt.storage.writer import Build, Layout, OutputTensor, layout

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in one weight file, unless asked otherwise, or the model is one file without a config."""
_REPAIR = "repair or drop the models that hold them, or leave --strict out"

Progress = Callable[[int, int], None]


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


def say_kept(error: BaseException, prepared: Prepared) -> None:
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
    return carry_out(alone, folder, shards, papers, settings=settings, overwrite=True)


def carry_out(
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
        raise NumericError(strictly(1), where=nonfinite_warnings(nonfinite), fix=_REPAIR)
    return nonfinite


def nonfinite_warnings(nonfinite: Mapping[str, int]) -> list[str]:
    if not nonfinite:
        return []
    total = sum(nonfinite.values())
    shown = ", ".join(f"{name} ({count})" for name, count in list(nonfinite.items())[:3])
    numbers = "1 number of the output is" if total == 1 else f"{total} numbers of the output are"
    tensors = "1 tensor" if len(nonfinite) == 1 else f"{len(nonfinite)} tensors"
    return [f"{numbers} NaN or infinite, in {tensors}: {shown}"]


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
