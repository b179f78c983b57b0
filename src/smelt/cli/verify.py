"""`smelt verify OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smelt.cli.options import Flag, Json, Quiet
from smelt.cli.show import counted, progress, size_text, visible
from smelt.errors import RecipeError, raise_all
from smelt.lineage.verify import Verification
from smelt.verifying import verify as run_verify

_SHOWN = 4


def verify(
    out: Path,
    /,
    *,
    model: Annotated[list[str], Parameter(negative="", show_default=False)] = [],  # noqa: B006
    sample: str | None = None,
    seed: int | None = None,
    strict: Flag = False,
    trust_pickles: Flag = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Check an output against its record.

    Every file must be there and as it was written, every tensor have its digest. A few tensors are recomputed from the
    inputs. Those of the hub are looked for in its cache; without the inputs no tensor is recomputed.

    Parameters
    ----------
    out
        The folder that `smelt merge` wrote.
    model
        Where an input is now, as NAME=PATH; NAME as in smelt.json. May be given several times.
    sample
        How many tensors to recompute, or `all`; 4 by default, if the inputs are there.
    seed
        Chooses the tensors to recompute; drawn, and printed, by default.
    strict
        Make warnings errors.
    trust_pickles
        Read inputs that are stored as pickles, by torch in a process apart.
    quiet
        Print nothing but errors.
    as_json
        Print the result as JSON.
    """
    with progress("verifying", quiet=quiet or as_json) as report:
        found = run_verify(
            out,
            models=_places(model),
            sample=sample,
            seed=seed,
            strict=strict,
            trust_pickles=trust_pickles,
            progress=report,
        )
    raise_all(found.problems)
    if as_json:
        print(json.dumps(_as_json(found, out), indent=1))
    elif not quiet:
        _say(found, out)
    return 0


def _places(words: list[str]) -> dict[str, Path]:
    places = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise RecipeError(f"'{word}' does not say where a model is", fix="write --model NAME=PATH")
        places[name] = Path(path)
    return places


def _say(found: Verification, out: Path) -> None:
    for warning in found.warnings:
        print(visible(f"warning: {warning}"), file=sys.stderr)
    print(f"{out}: {counted(found.tensors, 'tensor')}, {size_text(found.bytes)}, all as written")
    for note in found.notes:
        print(visible(f"note: {note}"))
    if found.recomputed:
        names = [*found.recomputed[:_SHOWN], *(["..."] if len(found.recomputed) > _SHOWN else [])]
        which = "all" if len(found.recomputed) == found.tensors else f"chosen by --seed {found.seed}"
        text = f"{counted(len(found.recomputed), 'tensor')} recomputed from the inputs, the same bits ({which}): "
        print(visible(text + ", ".join(names)))


def _as_json(found: Verification, out: Path) -> dict[str, object]:
    return {
        "ok": True,
        "out": str(out),
        "tensors": found.tensors,
        "bytes": found.bytes,
        "recomputed": list(found.recomputed),
        "seed": found.seed,
        "warnings": list(found.warnings),
        "notes": list(found.notes),
    }
