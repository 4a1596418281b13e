"""Targets: what counts as reached, what counts as better, what is refused."""

import doctest
import math

import pytest

import workloads.target
from workloads.target import Target, at_least, at_most

NAN = float("nan")


@pytest.mark.parametrize(
    ("target", "value", "reached"),
    [
        (at_least("a", 0.9), 0.91, True),
        (at_least("a", 0.9), 0.9, True),
        (at_least("a", 0.9), 0.89, False),
        (at_least("a", 0.9), NAN, False),
        (at_least("a", 0.9), -math.inf, False),
        (at_most("l", 1.5), 1.4, True),
        (at_most("l", 1.5), 1.5, True),
        (at_most("l", 1.5), 1.6, False),
        (at_most("l", 1.5), NAN, False),
        (at_most("l", 1.5), math.inf, False),
    ],
)
def test_reached(target: Target, value: float, reached: bool) -> None:
    assert target.reached(value) is reached


def test_better_follows_the_direction_and_puts_nan_last() -> None:
    up, down = at_least("a", 1.0), at_most("l", 1.0)
    assert up.better(2, 1)
    assert not up.better(1, 2)
    assert down.better(1, 2)
    assert not down.better(2, 1)
    for target in (up, down):
        assert not target.better(1, 1)
        assert target.better(1, NAN)
        assert not target.better(NAN, 1)
        assert not target.better(NAN, NAN)


def test_string_reads_as_an_inequality() -> None:
    assert str(at_least("valid_accuracy", 0.97)) == "valid_accuracy >= 0.97"
    assert str(at_most("valid_loss", 1.2)) == "valid_loss <= 1.2"


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_non_finite_targets_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"expected a finite target for a, got .*give a number"):
        at_least("a", value)


def test_unknown_directions_and_nameless_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="'at_least' or 'at_most', got 'upwards'"):
        Target("a", 1.0, "upwards")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected the name of a metric"):
        at_most("", 1.0)


def test_examples_in_the_docstring() -> None:
    assert doctest.testmod(workloads.target).failed == 0
