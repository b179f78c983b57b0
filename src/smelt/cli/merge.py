"""`smelt merge RECIPE OUT`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smelt.cli.nested import kept_json, of_steps
from smelt.cli.options import Allow, Flag, Json, Quiet, Seed, Verbose
from smelt.cli.show import count_text, counted, on_device, parse_size, progress, size_text, visible
from smelt.engine.backends import CPU
from smelt.merging import MergeReport
from smelt.merging import merge as run_merge
from smelt.prepared import Prepared


def merge(
    recipe: Path,
    out: Path,
    /,
    *,
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
    trust_digests: Flag = False,
    trust_pickles: Flag = False,
    keep_folder: Path | None = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> int:
    """Merge models as a recipe says, into a new folder.

    The folder appears whole or not at all. The inputs are never touched.

    Parameters
    ----------
    recipe
        The recipe, a YAML file.
    out
        The folder to write; it must not exist, or be empty.
    overwrite
        Replace OUT if it is there; the old one stays until the new one is complete.
    resume
        Go on where an earlier run of this merge was cut off; if interrupted, keep what is finished.
    shard_size
        Most bytes of tensors in one file, such as 5GB, which is the default; a state dict of one file stays one.
    threads
        Worker threads; all cores by default. The result does not depend on it.
    device
        Where the methods work: cpu, or with torch cuda (cuda:1); numbers may differ in the last place.
    memory
        Most memory to use, such as 500MB: threads and buffers are cut to fit. No limit by default. The result does not
        depend on it.
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
    trust_digests
        Copy tensors that stay as they are unread, with the digests that smelt.json of their model names.
    trust_pickles
        Read models that are stored as pickles, by torch in a process apart.
    keep_folder
        Where merges within the recipe lie that it asks to keep; .smelt-kept beside OUT by default.
    quiet
        Print nothing but errors.
    verbose
        Print every note of the plan, and log messages.
    as_json
        Print the result as JSON on stdout.
    """
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    quiet = quiet or as_json
    with progress("merging", quiet=quiet) as report:
        done = run_merge(
            recipe,
            out,
            overwrite=overwrite,
            resume=resume,
            shard_bytes=None if shard_size is None else parse_size(shard_size),
            workers=threads,
            device=device,
            memory=None if memory is None else parse_size(memory),
            seed=seed,
            allow=allow,
            strict=strict,
            hash_inputs=hash_inputs,
            trust_methods=trust_methods,
            trust_digests=trust_digests,
            trust_pickles=trust_pickles,
            keep_folder=keep_folder,
            progress=report,
            on_plan=None if quiet else lambda prepared: _say_plan(prepared, out, verbose=verbose),
            on_note=None if quiet else lambda note: print(visible(f"note: {note}"), file=sys.stderr),
        )
    if as_json:
        print(json.dumps(_as_json(done), indent=1))
    elif not quiet:
        _say_done(done)
    return 0


def _say_plan(prepared: Prepared, out: Path, *, verbose: bool) -> None:
    plan, forecast = prepared.plan, prepared.forecast
    names = ", ".join(model.published for model in plan.models)
    print(visible(f"{plan.method} of {names} -> {out}"), file=sys.stderr)
    print(
        f"{counted(len(plan.entries), 'tensor')}, {count_text(plan.parameters)} parameters; reads "
        f"{size_text(forecast.bytes_read)}, writes {size_text(forecast.bytes_written)}, "
        f"at most about {size_text(forecast.memory)} of memory{on_device(forecast.device, forecast.device_memory)}",
        file=sys.stderr,
    )
    for line in of_steps(prepared):
        print(visible(line), file=sys.stderr)
    if verbose:
        for note in plan.notes:
            print(visible(f"note: {note}"), file=sys.stderr)


def _say_done(done: MergeReport) -> None:
    for warning in done.warnings:
        print(visible(f"warning: {warning}"), file=sys.stderr)
    if done.trusted:
        copied = counted(len(done.trusted), "tensor")
        print(f"note: {copied} copied unread, with the digests of their models' records", file=sys.stderr)
    rate = (done.bytes_read + done.bytes_written) / max(done.engine_seconds, 1e-9)
    print(
        f"done: {done.out}  {size_text(done.bytes_written)} in {done.seconds:.1f} s "
        f"(tensors {done.engine_seconds:.1f} s, {size_text(rate)}/s)"
    )


def _as_json(done: MergeReport) -> dict[str, object]:
    return {
        "ok": True,
        "out": str(done.out),
        "method": done.plan.method,
        "tensors": len(done.plan.entries),
        "parameters": done.plan.parameters,
        "bytes_read": done.bytes_read,
        "bytes_written": done.bytes_written,
        "seconds": round(done.seconds, 3),
        "resumed": done.resumed,
        "engine_seconds": round(done.engine_seconds, 3),
        "commit_seconds": round(done.commit_seconds, 3),
        "nonfinite": dict(done.nonfinite),
        "trusted": len(done.trusted),
        **({"kept": kept_json(done.kept)} if done.kept else {}),
        "notes": list(done.plan.notes),
        "warnings": list(done.warnings),
    }
