"""Score every method on a zoo of tiny trained models: which skills does a merge keep, and what does it cost?

usage: python benchmarks/zoo/run.py --zoo FOLDER [--out zoo-results] [--state FILE] [--page docs/zoo.md]

FOLDER holds models that were trained from one base, and held-out texts and problems, laid out as examples/zoo is. Of
the groups of skills (law + addition, law + code, all three, law + subtraction) those are merged whose models and data
are there; with examples/zoo alone that is law + addition. Every method tries a few settings (sweeps.py) on one half of
the held-out data and is judged on the other. Results are kept in FILE as they come, so that a run that was cut off goes
on. Writes zoo.json and pictures to the folder --out, and the tables into the page between its marks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import report
from check import compared
from scoring import PROBLEMS, WINDOWS, Zoo
from study import Study
from sweeps import LEFT_OUT, SWEEPS

from smelt.errors import SmeltError
from smelt.methods import api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True, help="folder with base, skills and eval")
    parser.add_argument("--state", type=Path, help="where results are kept as they come; OUT/results.jsonl by default")
    parser.add_argument("--out", type=Path, default=Path("zoo-results"), help="folder for zoo.json and the pictures")
    parser.add_argument("--page", type=Path, help="a page that has the tables between marks")
    parser.add_argument("--only", help="methods, separated by commas; all by default")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of each text at most")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="problems of each kind at most")
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare with the zoo's own scores"
    )
    parser.add_argument("--no-figures", dest="figures", action="store_false")
    given = parser.parse_args()
    wanted = given.only.split(",") if given.only else [sweep.title for sweep in SWEEPS]
    if unknown := sorted(set(wanted) - {sweep.title for sweep in SWEEPS}):
        parser.error(f"no sweep is called {', '.join(unknown)}")
    if given.windows < 6 or given.problems < 6:
        parser.error("--windows and --problems must be at least 6, for there to be two halves")
    if given.figures:
        try:
            import figures
        except ImportError:
            raise SystemExit("error: the figures need matplotlib: pip install '.[bench]', or --no-figures") from None
    sweeps = [sweep for sweep in SWEEPS if sweep.title in wanted]
    zoo = Zoo(given.zoo, windows=given.windows, problems=given.problems)
    given.out.mkdir(parents=True, exist_ok=True)
    study = Study(zoo, given.state or given.out / "results.jsonl")
    if not study.groups():
        raise SystemExit(f"error: {given.zoo} has the skills of no group: at least legal and another one")
    for line in left_out(study):
        print(line)
    checked = list(compared(zoo)) if given.check else []
    for line in report.agreement(checked):
        print(line)
    started = time.perf_counter()
    for run in study.everything(sweeps):
        spent = time.perf_counter() - started
        print(f"{spent:6.0f} s  {run.group:22}  {run.title:18}  {run.label:22}  {run.split}", flush=True)
    results = report.results(study, sweeps, checked)
    written = [report.write_json(results, given.out)]
    if given.page is not None:
        written.append(report.write_tables(results, given.page))
    if given.figures:
        written += figures.draw(given.out)
    for line in report.tables(results):
        print(line)
    print("written:", *written)


def left_out(study: Study) -> Iterator[str]:
    """What is not measured, and why."""
    for method, why in LEFT_OUT.items():
        yield f"left out: {method} ({why})"
    for method in sorted(set(api.names()) - {sweep.method for sweep in SWEEPS} - set(LEFT_OUT)):
        yield f"left out: {method} (sweeps.py has no line for it yet)"
    for group in report.groups_left_out(study):
        yield f"left out: {group} (models or data are not there)"


if __name__ == "__main__":
    try:
        main()
    except SmeltError as error:
        print(error.render(), file=sys.stderr)
        sys.exit(error.exit_code)
