"""Scores: which line of a command's output is one, what a command that fails says, and how candidates are ranked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from smelt.errors import InputError, RecipeError, StorageError
from smelt.scoring import Scorer, read_scores


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("0.5", {"score": 0.5}),
        ("loading\n 12 \n\n", {"score": 12.0}),
        ("perplexity 8.25\n", {"perplexity": 8.25}),
        ("perplexity: 8.25", {"perplexity": 8.25}),
        ("acc = -1e-3", {"acc": -0.001}),
        ('{"law": 1.5, "sums": 99}\ndone in a while\n', {"law": 1.5, "sums": 99.0}),
        ("0.1\nthe second is 0.2 times better\n", {"score": 0.1}),
    ],
)
def test_the_last_line_of_numbers_counts(printed: str, expected: dict[str, float]) -> None:
    assert read_scores(printed) == expected


@pytest.mark.parametrize("printed", ["", "nothing", "a b c", '{"a": "b"}', '{"a": true}', "{}", "nan", "0.5\ninf", "{"])
def test_no_number(printed: str) -> None:
    with pytest.raises(InputError, match="printed no number"):
        read_scores(printed)


def test_commands() -> None:
    scorer = Scorer.of(f"{sys.executable} -c 'import sys; print(len(sys.argv[1]))' {{}}")
    assert scorer.score(Path("/a b; echo 7")) == {"score": 12.0}  # no shell: one word
    with pytest.raises(RecipeError, match=r"has no \{\}"):
        Scorer.of("evaluate")
    with pytest.raises(RecipeError, match="cannot be read"):
        Scorer.of("evaluate '{}")
    with pytest.raises(StorageError, match="cannot run /no/such/program"):
        Scorer.of("/no/such/program {}").score(Path())
    failing = Scorer.of(f"{sys.executable} -c 'import sys; print(1); sys.exit(\"no such task\")' {{}}")
    with pytest.raises(InputError) as raised:
        failing.score(Path("out"))
    assert "ended with exit code 1" in raised.value.message
    assert "| no such task" in raised.value.where
    with pytest.raises(InputError, match="was ended by signal 9"):
        Scorer.of(f"{sys.executable} -c 'import os; os.kill(os.getpid(), 9)' {{}}").score(Path())


def test_ranking() -> None:
    scores = {"a": {"x": 1.0}, "b": {"x": 3.0, "y": 0.0}, "c": {"x": 3.0}, "d": {"x": -1.0}}
    assert Scorer.of("e {}").rank(scores) == ["b", "c", "a", "d"]
    assert Scorer.of("e {}", lowest=True).rank(scores) == ["d", "a", "b", "c"]
