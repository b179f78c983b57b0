"""The one place that strings parse, plan, run, record and commit together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smelt.engine.backends import CPU, choose
from smelt.engine.run import check_equal
from smelt.errors import RecipeError
from smelt.guarding import inputs_of, refuse_places
from smelt.keeping import Kept
from smelt.lineage.trusted import trusted
from smelt.planning.entries import Plan
from smelt.prepared import Prepared, papers_of
from smelt.preparing import allowances, check_numbers, prepare, strictly
from smelt.recipe.schema import Recipe
from smelt.writing import (
    Progress,
    Settings,
    carry_out,
    carry_out_kept,
    check_steps,
    layout_of,
    nonfinite_warnings,
    say_kept,
)


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
            raise RecipeError(strictly(len(doubts)), where=doubts)
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
            done = carry_out(prepared, out, shards, papers, settings=settings, overwrite=overwrite, claims=claims)
        except BaseException as error:
            say_kept(error, prepared)
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
