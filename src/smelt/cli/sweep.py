"""`smelt sweep RECIPE --over SETTING=VALUES --out FOLDER`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smelt.cli.options import Allow, Flag, Json, Quiet, Seed, Verbose
from smelt.cli.show import counted, parse_size, progress, size_text, table, visible
from smelt.engine.backends import CPU
from smelt.listing import REMOVED, Row
from smelt.sweeping import SweepPlan, SweepReport, sweep_to


def sweep(
    recipe: Path,
    /,
    *,
    over: Annotated[list[str], Parameter(negative="")],
    out: Path,
    dry_run: Flag = False,
    score: str | None = None,
    lowest: Flag = False,
    keep_best: int | None = None,
    overwrite: Flag = False,
    resume: Flag = False,
    shard_size: Annotated[str | None, Parameter(name=["--shard-size", "--out-shard-size"])] = None,
    threads: int | None = None,
    device: str = CPU,
    memory: str | None = None,
    seed: Seed = 0,
    allow: Allow = [],  # noqa: B006
    strict: Flag = False,
    hash_inputs: Flag = False,
    trust_methods: Flag = False,
    trust_pickles: Flag = False,
    keep_folder: Path | None = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> int:
    """Merge a recipe with many settings at once, and score them.

    The inputs are read once, and every candidate is a folder in OUT. Each folder holds what `smelt merge` of that
    candidate's recipe would write; sweep.json in OUT lists them all. Candidates that are there already are left.

    Parameters
    ----------
    recipe
        The recipe, a YAML file.
    over
        A setting and its values: lambda=0.2:1.2:0.2 (first, last, step) or density=0.3,0.5. Given several times, all
        combinations. A setting of one model is models.NAME.weight, of a merge within the recipe merges.NAME.weight.
    out
        The folder in which the candidates will lie.
    dry_run
        Show the candidates and what they take, and write nothing.
    score
        A command to run on each candidate, such as 'python evaluate.py {}'; {} is its folder. The last line that it
        prints as a number, NAME NUMBER or a JSON object of numbers is the score.
    lowest
        Lower scores are better.
    keep_best
        Remove all but so many of the best candidates; all stay by default.
    overwrite
        Replace candidates that are there and are other merges.
    resume
        Go on where an earlier run of this sweep was cut off; if interrupted, keep what is finished.
    shard_size
        Most bytes of tensors in one file, such as 5GB, which is the default; a state dict of one file stays one.
    threads
        Worker threads; all cores by default. The result does not depend on it.
    device
        Where the methods work: cpu, or with torch cuda (cuda:1); numbers may differ in the last place.
    memory
        Most memory to use, such as 500MB: threads, buffers and candidates at a time are cut to fit. No limit by
        default.
    seed
        Seed of the random methods.
    allow
        Relax a check. May be given several times.
    strict
        Make warnings errors.
    hash_inputs
        Record the sha256 of every input file (reads them once more).
    trust_methods
        Load the method files that the recipe names; they are code.
    trust_pickles
        Read models that are stored as pickles, by torch in a process apart.
    keep_folder
        Where merges within the recipe lie that it asks to keep; .smelt-kept beside OUT by default.
    quiet
        Print nothing but errors.
    verbose
        Print log messages.
    as_json
        Print the result as JSON on stdout.
    """
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    quiet = quiet or as_json
    with progress("sweeping", quiet=quiet or dry_run) as report:
        done = sweep_to(
            recipe,
            over,
            out,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
            score=score,
            lowest=lowest,
            keep_best=keep_best,
            allow=allow,
            strict=strict,
            seed=seed,
            shard_bytes=None if shard_size is None else parse_size(shard_size),
            workers=threads,
            device=device,
            memory=None if memory is None else parse_size(memory),
            hash_inputs=hash_inputs,
            trust_methods=trust_methods,
            trust_pickles=trust_pickles,
            keep_folder=keep_folder,
            progress=report,
            on_plan=None if quiet else lambda plan: _say_plan(plan, whole=dry_run),
            on_note=None if quiet else lambda note: print(visible(f"note: {note}"), file=sys.stderr),
        )
    if as_json:
        print(json.dumps(_as_json(done), indent=1))
    elif not quiet and not dry_run:
        _say_done(done)
    errors = [*done.failed.values(), *done.unscored.values()]
    if not as_json:
        for error in errors:
            print(visible(error.render()), file=sys.stderr)
    return errors[0].exit_code if errors else 0


def _say_plan(plan: SweepPlan, *, whole: bool) -> None:
    """What will be done, on stderr; with `whole` the candidates too, on stdout."""
    todo = [one for one in plan.candidates if not one.there]
    if whole:
        print(
            visible(
                table([[one.name, size_text(one.bytes), "is there" if one.there else ""] for one in plan.candidates])
            )
        )
    there = len(plan.candidates) - len(todo)
    left = f", {there} of them done already" if there else ""
    print(f"{counted(len(plan.candidates), 'candidate')}{left}", file=sys.stderr)
    if todo:
        batches = f" in {len(plan.batches)} batches" if len(plan.batches) > 1 else ""
        print(
            f"reads {size_text(plan.bytes_read)}{batches}, writes {size_text(plan.bytes_written)}, at most about "
            f"{size_text(plan.memory)} of memory; as {counted(len(todo), 'merge')} it would read "
            f"{size_text(plan.apart_read)}",
            file=sys.stderr,
        )
    for warning in plan.warnings:
        print(visible(f"warning: {warning}"), file=sys.stderr)


def _say_done(done: SweepReport) -> None:
    rows = {row.name: row for row in done.rows}
    if done.ranking:
        shown = [*done.ranking, *(name for name in rows if name not in done.ranking)]
        print(visible(table([_line(rows[name]) for name in shown])))
    written = counted(len([one for one in done.plan.candidates if not one.there]) - len(done.failed), "candidate")
    print(
        visible(
            f"done: {done.out}  {written} written, {size_text(done.bytes_written)} in {done.seconds:.1f} s "
            f"(tensors {done.engine_seconds:.1f} s), {size_text(done.bytes_read)} read"
        )
    )


def _line(row: Row) -> list[str]:
    scores = ", ".join(value if name == "score" else f"{name} {value}" for name, value in _texts(row))
    return [row.name, scores or "no score", "removed" if row.state == REMOVED else ""]


def _texts(row: Row) -> list[tuple[str, str]]:
    return [(name, f"{value:.6g}") for name, value in row.scores.items()]


def _as_json(done: SweepReport) -> dict[str, object]:
    rows = {row.name: row for row in done.rows}
    errors = {**done.failed, **done.unscored}
    candidates = []
    for one in done.plan.candidates:
        row = rows.get(one.name)
        candidates.append(
            {
                "name": one.name,
                "settings": dict(one.settings),
                "folder": str(one.folder),
                "bytes": one.bytes,
                "was_there": one.there,
                **({"state": row.state, "digest": row.digest, "scores": dict(row.scores)} if row is not None else {}),
                **({"error": errors[one.name].render()} if one.name in errors else {}),
            }
        )
    return {
        "ok": not errors,
        "out": str(done.out),
        "candidates": candidates,
        "ranking": list(done.ranking),
        "bytes_read": done.bytes_read if done.rows else done.plan.bytes_read,
        "bytes_read_by_merges": done.plan.apart_read,
        "bytes_written": done.bytes_written if done.rows else done.plan.bytes_written,
        "seconds": round(done.seconds, 3),
        "engine_seconds": round(done.engine_seconds, 3),
        "warnings": list(done.plan.warnings),
    }
