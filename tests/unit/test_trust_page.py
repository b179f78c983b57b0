"""docs/trust.md: every row of the faults is there, and every proof that it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| (\d+|–) \| ", line)]
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
CASES = re.findall(r"`(\d\d-\*)`", PAGE)


@cache
def named_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_all_promises_and_all_faults() -> None:
    assert [row.split(" | ")[0].strip("| ") for row in ROWS] == [*map(str, range(1, 30)), "–"]
    promises = PAGE[PAGE.index("## Promises") : PAGE.index("## Faults")]
    assert re.findall(r"^(\d+)\. \*\*", promises, re.MULTILINE) == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(" | ")[0].strip("| "))
def test_every_fault_has_a_proof(row: str) -> None:
    *_, says, proof = row.strip("| ").split(" | ")
    assert says
    assert re.search(r"`tests/[\w/]+\.py::\w+`", proof)


@pytest.mark.parametrize(("path", "name"), sorted(set(TESTS)))
def test_every_named_test_exists(path: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in named_in(path)


@pytest.mark.parametrize("pattern", sorted(set(CASES)))
def test_every_named_case_exists(pattern: str) -> None:
    assert len(list((ROOT / "tests" / "corpus" / "reject").glob(pattern))) >= 2


def test_the_counts_of_allowed_differences() -> None:
    from fuzz.laws import STRICTER_HEADERS, STRICTER_INDEXES

    words = {6: "six", 7: "seven", 8: "eight", 9: "nine"}
    said = " ".join(PAGE.split())
    assert f"({words[len(STRICTER_HEADERS)]} for headers and {words[len(STRICTER_INDEXES)]} for indexes)" in said
