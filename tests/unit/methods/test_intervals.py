"""Ranges of parameters: what is written, what is refused, and that the way of writing makes no other range."""

from __future__ import annotations

import math

import pytest

from smelt.methods.fields import Field, Interval, per_model, required, scalar


@pytest.mark.parametrize("text", ["", "0, 1", "0, 1]", "[0, 1", "[0 1]", "[0, 1, 2]", "{0, 1}", ")0, 1("])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no interval"):
        Interval.parse(text)


def test_intervals_are_closed_unless_they_say_otherwise() -> None:
    interval = Interval(0.0, 1.0)
    assert interval.holds(0.0)
    assert interval.holds(1.0)
    assert interval == Interval.parse("[0, 1]")
    assert interval != Interval.parse("(0, 1]")
    assert interval != Interval.parse("[0, 1)")


def test_spaces_make_no_other_interval() -> None:
    assert Interval.parse("[0,1]") == Interval.parse("[0, 1]")
    assert Interval.parse("(0, inf)").high == math.inf


def test_both_ends_count() -> None:
    """A number beyond one end is out, on whichever side."""
    interval = Interval.parse("(0, 1)")
    assert [interval.holds(value) for value in (-0.5, 0.0, 0.5, 1.0, 1.5)] == [False, False, True, False, False]


@pytest.mark.parametrize("declare", [per_model, scalar])
def test_declared_ranges_are_kept(declare: object) -> None:
    field = declare(0.5, doc="a number", within="[0, 1)", name="other")  # type: ignore[operator]
    assert (field.default, field.doc, field.name) == (0.5, "a number", "other")
    assert field.within == Interval.parse("[0, 1)")
    assert field.per_model is (declare is per_model)
    assert declare(0.5, doc="a number").within is None  # type: ignore[operator]


def test_words_are_taken_as_they_are() -> None:
    field = scalar(0.5, doc="a number, or a word", words=("half",))
    assert field.words == ("half",)
    assert field.check("half") == "half"
    with pytest.raises(ValueError, match="must be a number or 'half'"):
        field.check("whole")


def test_what_was_expected_is_said() -> None:
    number = Field(1.0, False, "")
    for wrong, words in ((True, "a number"), ("x", "a number"), (math.inf, "a finite number"), (math.nan, "a finite")):
        with pytest.raises(ValueError, match=f"must be {words}"):
            number.check(wrong)
    for wrong in (2.5, True):
        with pytest.raises(ValueError, match="must be a whole number"):
            Field(1, False, "", kind="int").check(wrong)
    with pytest.raises(ValueError, match="must be true or false"):
        Field(True, False, "", kind="bool").check(0.5)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], not 1.5"):
        Field(1.0, False, "", Interval.parse("[0, 1]")).check(1.5)


def test_required_says_so() -> None:
    assert repr(required) == "required"
    assert Field(required, False, "").is_required
    assert not Field(0.0, False, "").is_required
