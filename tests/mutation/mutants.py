"""Mutation testing of the methods: change the source in one place, see whether a test notices.

    make mutants                                   # or: .venv/bin/python tests/mutation/mutants.py
    ... mutants.py --only '*/slerp.py' --number 20 # a quick look

A fixed sample of the changes that `changes.py` finds is drawn, from each file in proportion. `survey.py` runs the
suites once under coverage, to learn which tests touch a line. A mutant is given 25 of these, spread over files and
functions, cheapest first; one that survives them is given more of those that touch its line. All runs in copies of the
repository.
The result is `docs/design/mutants.md`; why a survivor survives is written in `survivors.toml`.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from changes import Change, changes_of, registered
from report import Row, write_report
from survey import TARGETS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHOSEN = 25
"""Tests a mutant is given first."""
MORE_SECONDS = 15.0
"""Measured time of the further tests that a survivor is given, of each kind."""
LIMIT = 60.0
"""Seconds after which a mutant counts as one that does not end; three times as many with the further tests."""
LEAST = 3
"""Changes taken from every file at least, where it has so many."""
LEFT_OUT = (".*", "__pycache__", "node_modules", "out", "dist", "build", "benchmarks")


@dataclass(frozen=True, slots=True)
class Survey:
    """What one run without a mutant has shown."""

    tests: tuple[str, ...]
    seconds: tuple[float, ...]
    failed: tuple[str, ...]
    touched: dict[str, dict[int, list[int]]]
    """file -> line -> tests."""
    imported: dict[str, set[int]]
    """file -> lines that run outside tests, when modules are imported."""

    def cheapest(self, test: int) -> tuple[float, str]:
        return self.seconds[test], self.tests[test]

    def dearest(self, test: int) -> tuple[float, str]:
        return -self.seconds[test], self.tests[test]


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        state = Path(arguments.state or name).resolve()
        roots = [state / f"copy{i}" for i in range(arguments.jobs)]
        for source, root in zip([ROOT, *roots], roots, strict=False):  # a copy of the copy: the sources may change
            _copy(source, root)
        sys.path.insert(0, str(roots[0] / "src"))
        survey = take_survey(roots[0], state)
        if survey.failed:
            print(f"{len(survey.failed)} tests fail without a mutant and are left out: {', '.join(survey.failed[:5])}")
        places, sample = draw(roots[0], number=arguments.number, seed=arguments.seed, only=arguments.only)
        print(f"{sum(places.values())} changes in {len(places)} files; {len(sample)} drawn; {len(survey.tests)} tests")
        rows = run_all(roots, state, survey, sample)
        (state / "results.jsonl").write_text("".join(_as_json(row) for row in rows), encoding="utf-8")
    return write_report(
        rows,
        places,
        reasons=HERE / "survivors.toml",
        out=None if arguments.only else ROOT / "docs" / "design" / "mutants.md",
        seed=arguments.seed,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mutation testing of the methods.")
    parser.add_argument("--number", type=int, default=400, help="mutants to draw (400)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--only", default="", help="a glob on file names; the report is then printed, not written")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--state", default="", help="a folder that keeps the survey for the next run, and all results")
    return parser.parse_args()


def _copy(source: Path, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(*LEFT_OUT))


def _environment(root: Path) -> dict[str, str]:
    """`smelt` is the copy's; libraries have one thread, so that the process can fork."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        **environment,
        **threads,
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(HERE)]),
        "PYTHONHASHSEED": "0",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(root / ".hypothesis"),
        "PYTEST_ADDOPTS": "",
    }


def _as_json(row: Row) -> str:
    return json.dumps({"place": row.place, "kind": row.change.kind, "change": row.change.told(), **row.reply}) + "\n"


# The survey


def take_survey(root: Path, state: Path) -> Survey:
    """Run the suites once under coverage, or read what the last run in the same folder has found."""
    digest = hashlib.sha256()
    for path in sorted([*(root / "src").rglob("*.py"), *(root / "tests").rglob("*.py"), *HERE.glob("survey.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    out = state / f"survey-{digest.hexdigest()[:16]}.json"
    if not out.exists():
        command = [sys.executable, str(HERE / "survey.py"), str(root), str(out)]
        done = subprocess.run(command, cwd=root, env=_environment(root), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            hint = "\npip install coverage" if "No module named 'coverage'" in done.stderr else ""
            raise SystemExit(f"the survey failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}{hint}")
    found = json.loads(out.read_text(encoding="utf-8"))
    touched = {file: {int(line): tests for line, tests in lines.items()} for file, lines in found["touched"].items()}
    imported = {file: set(lines) for file, lines in found["imported"].items()}
    return Survey(tuple(found["tests"]), tuple(found["seconds"]), tuple(found["failed"]), touched, imported)


def touching(change: Change, survey: Survey, root: Path) -> set[int]:
    """The tests that run the changed statement; for one that runs at import, those that run what depends on it."""
    lines = survey.touched.get(change.file, {})

    def of(numbers: Sequence[int]) -> set[int]:
        return {test for line in numbers for test in lines.get(line, ())}

    found = of(range(change.first, change.last + 1))
    if found:
        return found
    for scope in change.scope:
        found = found or of(scope)
    for name in change.names:
        found |= _of_method(name, survey) | _users(name, survey, root)
    return found or {test for tests in lines.values() for test in tests}


def _of_method(name: str, survey: Survey) -> set[int]:
    """Tests with the name of a method among their parameters."""
    named = re.compile(rf"[\[-]{re.escape(name)}[\]-]")
    return {i for i, test in enumerate(survey.tests) if named.search(test)}


def _users(name: str, survey: Survey, root: Path) -> set[int]:
    """Tests that run a statement with the name of a constant, and those of methods that are declared with it."""
    found: set[int] = set()
    for file, lines in survey.touched.items():
        for statement in ast.parse((root / file).read_bytes()).body:
            used = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id == name]
            for node in used:
                found.update(lines.get(node.lineno, ()))
            for method in registered(statement) if used else ():
                found |= _of_method(method, survey)
    return found


def in_turn(tests: Iterable[int], survey: Survey) -> list[int]:
    """Tests in turn from each file and in it from each function, the cheapest first."""
    files: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for test in sorted(tests, key=survey.cheapest):
        function = survey.tests[test].split("[")[0]
        files[function.split("::")[0]][function].append(test)
    turns = [[turn for turns in _turns(list(functions.values())) for turn in turns] for functions in files.values()]
    return [test for turn in _turns(turns) for test in turn]


def choose(change: Change, survey: Survey, root: Path) -> tuple[list[str], list[str]]:
    """CHOSEN tests that touch the change, and further ones, also of those that touch the file: a cache hides lines.

    For a statement that runs at import, one test of each function as well.
    """
    found = touching(change, survey, root)
    order = in_turn(found, survey)
    first, more = order[:CHOSEN], _within(MORE_SECONDS, order[CHOSEN:], survey)
    of_file = {test for tests in survey.touched.get(change.file, {}).values() for test in tests}
    more += _within(MORE_SECONDS, in_turn(of_file - found, survey), survey)
    if not survey.imported.get(change.file, set()).isdisjoint(range(change.first, change.last + 1)):
        others = {survey.tests[i].split("[")[0]: i for i in sorted(range(len(survey.tests)), key=survey.dearest)}
        rest = sorted(set(others.values()) - {*first, *more}, key=survey.cheapest)
        more += _within(MORE_SECONDS, rest, survey)
    chosen, further = ([survey.tests[i] for i in sorted(tests, key=survey.cheapest)] for tests in (first, more))
    return chosen, further


def _within(seconds: float, tests: Iterable[int], survey: Survey) -> list[int]:
    """Tests in order, as many as can be run in the time."""
    found = []
    for test in tests:
        seconds -= survey.seconds[test]
        if seconds >= 0.0:
            found.append(test)
    return found


def _turns(queues: Sequence[Sequence[int]]) -> list[list[int]]:
    """The first of each queue, then the second of each, ..."""
    longest = max(map(len, queues), default=0)
    return [[one[turn] for one in queues if turn < len(one)] for turn in range(longest)]


# The draw


def draw(root: Path, *, number: int, seed: int, only: str) -> tuple[dict[str, int], list[Change]]:
    """How many changes each file has, and a sample of them: from each file in proportion, LEAST at least."""
    paths = sorted({path for pattern in TARGETS for path in root.glob(pattern)})
    found = {}
    for path in paths:
        module = ".".join(path.relative_to(root / "src").with_suffix("").parts)
        if path.stem != "__init__" and (not only or path.match(only)):
            found[path] = changes_of(path, root=root, module=module)
    total = sum(map(len, found.values()))
    sample = []
    for path, changes in found.items():
        file = path.relative_to(root).as_posix()
        share = min(len(changes), max(LEAST, round(number * len(changes) / total)))
        drawn = random.Random(f"{seed} {file}").sample(changes, share)
        sample += sorted(drawn, key=lambda change: (change.start, change.stop, change.new))
    return {path.relative_to(root).as_posix(): len(changes) for path, changes in found.items()}, sample


# The runs


class Server:
    """A process that runs mutants in a copy of the repository."""

    def __init__(self, root: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), str(root), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(root),
        )

    def ask(self, file: str, content: bytes, tests: Sequence[str], *, limit: float = LIMIT) -> dict[str, Any]:
        job = {"file": file, "content": base64.b64encode(content).decode(), "tests": tests, "limit": limit}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise SystemExit("a server of mutants has ended")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def run_all(roots: Sequence[Path], state: Path, survey: Survey, sample: Sequence[Change]) -> list[Row]:
    """Every mutant's fate, in the order of the sample. First each file as it is: that must pass."""
    jobs: queue.SimpleQueue[tuple[int, Change, bool]] = queue.SimpleQueue()
    first = {change.file: change for change in sample}
    for change in first.values():
        jobs.put((-1, change, True))
    for number, change in enumerate(sample):
        jobs.put((number, change, False))
    rows: dict[int, Row] = {}
    trouble: list[str] = []

    def work(root: Path, server: Server) -> None:
        while not trouble:
            try:
                number, change, control = jobs.get_nowait()
                source = (root / change.file).read_bytes()
                chosen, more = choose(change, survey, root)
                if control:
                    reply = server.ask(change.file, source, chosen)
                    if reply["outcome"] != "survived":
                        trouble.append(f"{change.file} as it is: {reply}")
                    continue
                reply = server.ask(change.file, change.applied(source), chosen)
                reply["tests"], reply["round"] = len(chosen), 1
                if reply["outcome"] in ("survived", "empty") and more:
                    reply = server.ask(change.file, change.applied(source), more, limit=3 * LIMIT)
                    reply["tests"], reply["round"] = len(chosen) + len(more), 2
                line = source.splitlines()[change.line - 1].decode().strip()
                rows[number] = Row(change, line, reply)
                if rows[number].fate == "survived" or len(rows) % 50 == 0:
                    print(f"{len(rows)} of {len(sample)}: {rows[number].place} {reply['outcome']}", flush=True)
            except queue.Empty:
                return
            except BaseException as error:
                trouble.append(repr(error))

    servers = [Server(root, state / f"server{i}") for i, root in enumerate(roots)]
    threads = [threading.Thread(target=work, args=pair) for pair in zip(roots, servers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in servers:
        server.close()
    if trouble:
        raise SystemExit("\n".join(trouble))
    return [rows[number] for number in sorted(rows)]


if __name__ == "__main__":
    sys.exit(main())
