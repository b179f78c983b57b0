"""The one place that strings parse, plan, run, record and commit together."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from smelt.engine.forecast import Forecast, forecast
from smelt.engine.run import RunResult, check_equal, run
from smelt.errors import InputError, RecipeError, StorageError
from smelt.lineage.card import CARD, card
from smelt.lineage.record import RECORD, file_digest, record
from smelt.planning.build import build, check_recipe
from smelt.planning.check import check
from smelt.planning.companions import small_files
from smelt.planning.entries import Plan
from smelt.planning.locate import Model, open_models
from smelt.recipe.canonical import canonical, to_yaml
from smelt.recipe.parse import from_dict, load
from smelt.recipe.schema import Recipe, Relaxation
from smelt.storage import files
from smelt.storage.writer import Build, OutputTensor, layout

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in one weight file, unless asked otherwise."""
ALLOWED = get_args(Relaxation)
"""What `allow` may relax."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked recipe with its models open and its plan: all that is known before a byte is written."""

    recipe: Recipe
    opened: Mapping[str, Model]
    models: tuple[Model, ...]
    plan: Plan
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did. `seconds` is the whole call, `engine_seconds` the part that reads, works and writes tensors."""

    out: Path
    plan: Plan
    seconds: float
    engine_seconds: float
    bytes_read: int
    bytes_written: int
    nonfinite: Mapping[str, int]
    warnings: tuple[str, ...]


@contextmanager
def prepare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    allow: Iterable[str] = (),
    strict: bool = False,
    seed: int = 0,
    workers: int | None = None,
    tile: int | None = None,
) -> Iterator[Prepared]:
    """Parse, open and plan; the models are closed when the context ends.

    `recipe` is a path, a mapping or a Recipe. `strict` makes warnings errors. Raises RecipeError or InputError with
    every problem that was found.
    """
    allowed = frozenset(allow)
    if unknown := sorted(allowed - set(ALLOWED)):
        raise RecipeError(f"unknown word to allow: {', '.join(unknown)}", fix=f"known are {', '.join(ALLOWED)}")
    beside = None
    if isinstance(recipe, str | Path):
        beside = Path(recipe).resolve().parent
        recipe = load(Path(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = from_dict(recipe)
    check_recipe(recipe)
    with ExitStack() as stack:
        opened = open_models(recipe.model_names(), beside=beside, stack=stack)
        plan = build(recipe, opened, allow=allowed, seed=seed)
        models = tuple({id(opened[name.text]): opened[name.text] for name in recipe.model_names()}.values())
        if strict and plan.warnings:
            raise RecipeError(
                f"{len(plan.warnings)} warnings, and --strict makes them errors", where=list(plan.warnings)
            )
        yield Prepared(recipe, opened, models, plan, forecast(plan, workers=workers, tile=tile))


def plan(recipe: Recipe | Mapping[str, Any] | str | Path, *, allow: Iterable[str] = (), seed: int = 0) -> Plan:
    """What a merge of this recipe would do, from headers and configs alone. Raises as `merge` does."""
    with prepare(recipe, allow=allow, seed=seed) as prepared:
        return prepared.plan


def merge(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    allow: Iterable[str] = (),
    strict: bool = False,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    tile: int | None = None,
    hash_inputs: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[Prepared], None] | None = None,
) -> MergeReport:
    """Merge models as a recipe says, into the folder `out`, which appears whole or not at all.

    `allow` relaxes checks by name (`extra_tensor`, `missing_tensor`, `nonfinite`, `vocabulary`); `seed` drives the
    random methods;
    `workers` (threads) and `tile` (elements) change the speed, never the result; `hash_inputs` records the sha256 of
    every input file. `progress` is called with (bytes done, bytes in all), `on_plan` once before anything is written.

    Raises RecipeError, InputError, StorageError or NumericError, after which `out` is what it was before.
    """
    started = time.perf_counter()
    out = Path(out)
    with prepare(recipe, allow=allow, strict=strict, seed=seed, workers=workers, tile=tile) as prepared:
        plan, models = prepared.plan, prepared.models
        _refuse_overlap(out, models)
        shards = layout([OutputTensor(e.name, e.dtype, e.shape) for e in plan.entries], shard_bytes=shard_bytes)
        check(plan, models, shards)
        sources = [model.source for model in models]
        check_equal(plan, sources)
        if on_plan is not None:
            on_plan(prepared)
        with Build.start(out, shards, overwrite=overwrite) as folder:
            done = run(
                plan,
                sources,
                folder,
                workers=workers,
                tile=tile,
                allow_nonfinite="nonfinite" in allow or "nonfinite" in prepared.recipe.allow,
                progress=progress,
            )
            hashes = {
                (i, info.name): known
                for i, source in enumerate(sources)
                for info in source.files
                if (known := info.blob_sha256 or (_sha256(info.path) if hash_inputs else None))
            }
            _refuse_changed(models)
            _write_papers(folder, prepared, done, hashes, name=out.resolve().name)
            folder.commit()
    nonfinite = {r.name: r.inherited + r.created for r in done.tensors if r.inherited + r.created}
    return MergeReport(
        out=out,
        plan=plan,
        seconds=time.perf_counter() - started,
        engine_seconds=done.seconds,
        bytes_read=prepared.forecast.bytes_read,
        bytes_written=shards.total_bytes,
        nonfinite=nonfinite,
        warnings=(*plan.warnings, *_nonfinite_warnings(nonfinite)),
    )


def _refuse_overlap(out: Path, models: Sequence[Model]) -> None:
    """The output must not be, hold, or lie in a folder that the merge reads."""
    target = out.expanduser().absolute().resolve()
    for model in models:
        root = model.source.root
        if root is None:
            continue
        given = Path(root).resolve()
        if target == given or target.is_relative_to(given) or given.is_relative_to(target):
            relation = "is" if target == given else "lies in" if target.is_relative_to(given) else "holds"
            raise StorageError(
                f"the output folder {relation} an input",
                where=[f"output {target}", f"input  {given}"],
                fix="choose an output folder apart from the models: inputs are never touched",
            )


def _refuse_changed(models: Sequence[Model]) -> None:
    changed = [f"{model.name}: {name}" for model in models for name in model.source.changed()]
    if changed:
        raise InputError(
            "input files were changed while they were being read",
            where=changed,
            fix="run again, and leave the inputs alone meanwhile",
        )


def _sha256(path: Path) -> str:
    """sha256 of a whole file, as the hub has it for its large files."""
    digest = hashlib.sha256()
    with files.open_read(path) as file:
        buffer = bytearray(min(8 << 20, max(file.size, 1)))
        for start in range(0, file.size, len(buffer)):
            piece = memoryview(buffer)[: min(len(buffer), file.size - start)]
            file.read_into(start, piece)
            digest.update(piece)
    return digest.hexdigest()


def _write_papers(
    folder: Build, prepared: Prepared, done: RunResult, hashes: Mapping[tuple[int, str], str], *, name: str
) -> None:
    """Config, tokenizer, licence, card, recipe and record, into the build folder."""
    plan, models = prepared.plan, prepared.models
    donor = models[plan.donor]
    papers = small_files(plan, models)
    public = canonical(prepared.recipe, rename=published_names(prepared))
    donor_card = donor.source.text("README.md") if "README.md" in donor.source.other_files() else None
    papers["mergekit_config.yml"] = to_yaml(public).encode()
    papers[CARD] = card(plan, name=name, recipe=public, donor_card=donor_card, has_config="config.json" in papers)
    for file, content in papers.items():
        folder.put(file, content)
    folder.put(
        RECORD,
        record(
            plan,
            folder.layout,
            recipe=public,
            inputs=[model.source.files for model in models],
            hashes=hashes,
            tensors={result.name: result.digest for result in done.tensors},
            nonfinite={r.name: r.inherited + r.created for r in done.tensors if r.inherited + r.created},
            companions={file: file_digest(content) for file, content in papers.items()},
        ),
    )


def published_names(prepared: Prepared) -> dict[str, str]:
    """The recipe's model names -> the names under which the output's papers speak of them: no local path."""
    return {text: model.planned.published for text, model in prepared.opened.items()}


def _nonfinite_warnings(nonfinite: Mapping[str, int]) -> list[str]:
    if not nonfinite:
        return []
    total = sum(nonfinite.values())
    shown = ", ".join(f"{name} ({count})" for name, count in list(nonfinite.items())[:3])
    return [f"{total} numbers of the output are NaN or infinite, in {len(nonfinite)} tensors: {shown}"]
