"""`smelt verify OUT`."""

from __future__ import annotations

import json
from pathlib import Path

from smelt.cli.options import Json, Quiet
from smelt.cli.show import counted, progress, size_text
from smelt.errors import raise_all
from smelt.lineage.verify import verify as run_verify


def verify(
    out: Path,
    /,
    *,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Check an output against its record: every file is there and as it was written, every tensor has its digest.

    Parameters
    ----------
    out
        The folder that `smelt merge` wrote.
    quiet
        Print nothing but errors.
    as_json
        Print the result as JSON.
    """
    with progress("verifying", quiet=quiet or as_json) as report:
        found = run_verify(out, progress=report)
    raise_all(found.problems)
    if as_json:
        print(json.dumps({"ok": True, "out": str(out), "tensors": found.tensors, "bytes": found.bytes}))
    elif not quiet:
        print(f"{out}: {counted(found.tensors, 'tensor')}, {size_text(found.bytes)}, all as written")
    return 0
