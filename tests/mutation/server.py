"""Runs mutants one after the other, each in a fork of this process, in a copy of the repository that is its own.

    python server.py ROOT FOLDER

Reads lines of JSON {file, content, tests, limit} and answers each with one: {outcome, seconds, by, why}. What tests
need beside smelt is imported once, before the forks; smelt itself is imported in the fork, from ROOT.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from survey import OPTIONS, Chosen, settle

DEPENDENCIES = (
    "numpy",
    "ml_dtypes",
    "array_api_compat.numpy",
    "hypothesis.extra.numpy",
    "pydantic",
    "ruamel.yaml",
    "safetensors.numpy",
    "xxhash",
    "numba",
)
MEMORY = 8 << 30
"""Bytes of address space of a fork: a mutant that asks for more fails instead of stopping the machine."""

PASSED, FAILED, EMPTY, FOREIGN = 0, 1, 5, 99


class Verdict:
    """Keeps the first failure: which test or file, and the last line of what it says."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: Any) -> None:
        if report.failed and not self._path.exists():
            last = str(report.longrepr).strip().splitlines()[-1:]
            self._path.write_text(json.dumps([report.nodeid, *last]), encoding="utf-8")


def in_fork(root: Path, folder: Path, tests: Sequence[str]) -> int:
    """Run the tests with what stands in `root` now; pytest's exit code."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with (folder / "log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import smelt

    if not Path(smelt.__file__).is_relative_to(root):
        return FOREIGN
    settle()
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    options = [*OPTIONS, f"--rootdir={root}", f"--basetemp={folder / 'tmp'}", *files]
    return int(pytest.main(options, plugins=[Chosen(tests), Verdict(folder / "failure")]))


def run(root: Path, folder: Path, job: dict[str, Any], stamp: int) -> dict[str, Any]:
    """Put the mutant in place, run its tests in a fork, put the original back."""
    path = root / job["file"]
    original, times = path.read_bytes(), path.stat()
    path.write_bytes(base64.b64decode(job["content"]))
    # Compiled modules are told apart by time and size: no two mutants may share both.
    os.utime(path, (stamp, stamp))
    (folder / "failure").unlink(missing_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            code = in_fork(root, folder, job["tests"])
        finally:
            os._exit(code)
    code = _wait(child, started + job["limit"])
    path.write_bytes(original)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if code == FOREIGN:
        raise SystemExit(f"smelt was not imported from {root}")
    outcome = "timeout" if code is None else {PASSED: "survived", EMPTY: "empty"}.get(code, "killed")
    by, why = "", ""
    if outcome == "killed" and (folder / "failure").exists():
        by, why = (*json.loads((folder / "failure").read_text(encoding="utf-8")), "")[:2]
    elif outcome == "killed":
        why = (folder / "log").read_text(encoding="utf-8", errors="replace")[-500:]
    return {"outcome": outcome, "seconds": round(time.monotonic() - started, 2), "by": by, "why": why}


def _wait(child: int, until: float) -> int | None:
    """The exit code of a fork; None where it had to be stopped."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)


def main(root: Path, folder: Path) -> None:
    for name in DEPENDENCIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert "smelt" not in sys.modules
    os.chdir(root)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    stamp = 1_000_000_000
    for line in sys.stdin:
        stamp += 1
        reply = run(root, folder, json.loads(line), stamp)
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
