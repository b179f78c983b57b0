"""One run of the suites under coverage: which tests pass, how long each takes, and which lines it touches.

    python survey.py ROOT OUT

ROOT is a copy of the repository, OUT the file that is written (JSON). `Chosen` and `settle` are used by `server.py`
too, so that tests run in the same way under the survey and with a mutant.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

SUITES = (
    "tests/unit/methods",
    "tests/unit/recipe",
    "tests/unit/engine",
    "tests/reference",
    "tests/property",
    "tests/conformance",
    "tests/golden",
    "tests/e2e/test_own_methods.py",
)
LEFT_OUT = ("tests/conformance/test_kernels.py",)
"""Tests that compare two implementations with each other say nothing about the meaning of either."""
TARGETS = ("src/smelt/methods/*.py", "src/smelt/recipe/select.py")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "--no-header")


def settle() -> None:
    """Make hypothesis draw the same examples in every run, and not look for smaller ones that fail too."""
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None, deadline=None, phases=phases)
    hypothesis.settings.load_profile("mutation")


class Chosen:
    """Runs the given tests only, in the given order; one that is not found is passed over."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._place = {test: place for place, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self._place), key=self._order)

    def _order(self, item: pytest.Item) -> int:
        return self._place[item.nodeid]


class Recorder:
    """Gives coverage the name of the test that runs, and keeps the times of those that pass."""

    def __init__(self, coverage: Any) -> None:
        self._coverage = coverage
        self.seconds: dict[str, float] = defaultdict(float)
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._coverage.switch_context(item.nodeid)
        yield
        self._coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
            self.passed.add(report.nodeid)


def main(root: Path, out: Path) -> int:
    import coverage

    include = [str(root / pattern) for pattern in TARGETS]
    watch = coverage.Coverage(data_file=None, include=include, config_file=False)
    recorder = Recorder(watch)
    settle()
    watch.start()
    options = [option for option in OPTIONS if option != "-x"]
    options += [f"--ignore={path}" for path in LEFT_OUT]
    pytest.main([*options, f"--rootdir={root}", f"--basetemp={out.parent / 'tmp'}", *SUITES], plugins=[recorder])
    watch.stop()
    import smelt

    if not Path(smelt.__file__).is_relative_to(root):
        raise SystemExit(f"the tests ran with {smelt.__file__}, not with the copy in {root}")
    tests = sorted(recorder.passed - recorder.failed)
    number = {test: i for i, test in enumerate(tests)}
    data = watch.get_data()
    touched, imported = {}, {}
    for file in data.measured_files():
        lines = data.contexts_by_lineno(file)
        name = Path(file).relative_to(root).as_posix()
        touched[name] = {line: sorted(number[t] for t in found if t in number) for line, found in lines.items()}
        imported[name] = [line for line, found in lines.items() if "" in found]
    survey = {
        "tests": tests,
        "seconds": [round(recorder.seconds[test], 4) for test in tests],
        "failed": sorted(recorder.failed),
        "touched": touched,
        "imported": imported,
    }
    out.write_text(json.dumps(survey), encoding="utf-8")
    return 0 if tests else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
