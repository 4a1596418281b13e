"""When an instrument is due, and who may pay for what."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cockpit_bench.cadence import At, Budget, Every, Spread, as_cadence, at, every, never, spread, water_level


def due(cadence: Any, steps: int) -> list[int]:
    return [step for step in range(steps) if cadence(step)]


def test_every_and_at_and_never() -> None:
    assert due(every(3), 10) == [0, 3, 6, 9]
    assert due(every(3, start=4), 11) == [4, 7, 10]
    assert due(at(0, 7, 7, 2), 10) == [0, 2, 7]
    assert due(never, 10) == []


def test_cadences_are_values() -> None:
    assert (every(3), at(1, 2), spread(4, 10)) == (Every(3), At(frozenset({2, 1})), Spread(4, 10))
    assert repr(every(10)) == "Every(n=10, start=0)"
    assert repr(spread(40, 1000)) == "Spread(readings=40, steps=1000)"


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_spread_takes_that_many_evenly(readings: int, steps: int) -> None:
    found = due(spread(readings, steps), steps)
    assert found[0] == 0
    assert len(found) == min(readings, steps)
    if readings <= steps:
        assert found == [-(-k * steps // readings) for k in range(readings)]
    gaps = np.diff([*found, steps])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("n", [5, np.int64(5)])
def test_an_int_is_every_n_steps(n: Any) -> None:
    assert as_cadence(n) == Every(5)


def test_a_function_is_a_cadence() -> None:
    odd = lambda step: step % 2 == 1  # noqa: E731
    assert as_cadence(odd) is odd
    assert as_cadence(never) is never


@pytest.mark.parametrize("wrong", [0, -1, True, False, 2.0, "10", None, float("nan")])
def test_what_is_no_cadence_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"at least 1, got .*every\(n\), at\(0, 10\)"):
        as_cadence(wrong)


@pytest.mark.parametrize(
    "make",
    [lambda: every(0), lambda: every(1, start=-1), lambda: at(1, -1), lambda: at(0.5), lambda: spread(0, 10)],
)
def test_misuse_of_the_makers(make: Any) -> None:
    with pytest.raises(ValueError, match="whole number"):
        make()


amounts = st.floats(0, 1000)


@settings(deadline=None)
@given(amounts, st.lists(amounts, max_size=8))
def test_the_water_level_solves_its_equation(pool: float, others: list[float]) -> None:
    level = water_level(pool, others)
    assert sum(min(spent, level) for spent in others) + level == pytest.approx(pool, abs=1e-6)


@pytest.mark.parametrize("share", [-0.1, 1.5, 5, float("nan"), True])
def test_a_share_is_a_fraction(share: float) -> None:
    with pytest.raises(ValueError, match=r"write 0\.05 for five per cent"):
        Budget(share)


def test_no_share_is_no_limit() -> None:
    budget = Budget(None)
    for _ in range(3):
        assert budget.affords("dear", 1e9, 0.0)
        budget.pay("dear", 1e9)
    assert budget.spent == {"dear": 3e9}


def test_the_first_reading_is_free_but_counted() -> None:
    budget = Budget(0.1)
    assert budget.affords("a", 5.0, 0.0)
    budget.pay("a", 5.0)
    assert budget.spent == {"a": 5.0}
    assert not budget.affords("a", 1.0, 59.9)  # the pool must also cover the first one
    assert budget.affords("a", 1.0, 60.1)
    assert budget.affords("b", 5.0, 0.0)


def test_what_one_leaves_the_others_may_use() -> None:
    budget = Budget(0.1)
    budget.pay("cheap", 1.0)
    budget.pay("dear", 1.0)
    assert budget.affords("dear", 7.9, 100.0)  # 10 in the pool: more than half of it, but cheap wants no more
    assert not budget.affords("dear", 8.1, 100.0)


def test_a_refused_key_is_not_overtaken_by_one_that_spent_more() -> None:
    budget = Budget(0.1)
    budget.pay("dear", 1.0)
    for _ in range(51):
        budget.pay("cheap", 0.2)
    assert budget.affords("cheap", 0.2, 119.0)
    assert not budget.affords("dear", 4.0, 120.0)
    assert not budget.affords("cheap", 0.2, 130.0)  # 3 are left, but dear waits for them
    assert budget.affords("dear", 4.0, 153.0)  # 15.2 in all, first readings included
    budget.pay("dear", 4.0)
    assert budget.affords("cheap", 0.2, 155.0)


def test_what_was_paid_survives_a_resume() -> None:
    first = Budget(0.1)
    first.pay("a", 5.0)
    first.pay("a", 1.0)
    first.pay("b", 0.1)
    second = Budget(0.1)
    second.load_state_dict(first.state_dict())
    for seconds, fits in ((70.0, False), (72.0, True)):  # 7.1 = 5.1 of first readings + 1 paid + 1 asked for
        assert first.affords("b", 1.0, seconds) is second.affords("b", 1.0, seconds) is fits
    assert not second.affords("a", 1.0, 65.0)
    second.pay("a", 1.0)
    assert second.spent == {"a": 7.0, "b": 0.1}
    assert first.spent == {"a": 6.0, "b": 0.1}


def test_first_readings_are_paid_back_and_leave_a_quarter_to_the_others_meanwhile() -> None:
    budget = Budget(0.1)
    budget.pay("dear", 6.0)
    budget.pay("cheap", 0.01)
    for second in range(100):
        if budget.affords("cheap", 0.01, float(second)):
            budget.pay("cheap", 0.01)
    later = sum(budget.spent.values()) - 6.01
    assert later == pytest.approx(0.99, abs=0.011), "one reading a second, which is a tenth of the pool"
    budget = Budget(0.1)
    budget.pay("dear", 6.0)
    budget.pay("cheap", 0.1)
    assert not budget.affords("cheap", 0.5, 19.0)  # a quarter of 1.9 is too little
    assert budget.affords("cheap", 0.5, 21.0)
    assert not budget.affords("cheap", 4.0, 99.0)  # 6.1 + 4 of 9.9: paid back in full
    assert budget.affords("cheap", 3.7, 99.0)


def test_what_nobody_is_billed_for_comes_off_the_pool() -> None:
    budget = Budget(0.1)
    budget.pay("a", 1.0)
    assert budget.affords("a", 1.0, 21.0)
    budget.overhead = 0.2
    assert not budget.affords("a", 1.0, 21.0)
    assert budget.affords("a", 1.0, 23.0)
    budget.overhead = 1e9
    assert not budget.affords("a", 0.0, 23.0)


prices = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-4, 10.0), min_size=1)


@settings(deadline=None)
@given(st.floats(0, 1), prices, st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 100)), max_size=150))
def test_the_whole_never_exceeds_the_pool_and_the_first_readings(
    share: float, price: dict[str, float], asks: list[tuple[str, float]]
) -> None:
    budget, seconds = Budget(share), 0.0
    for key, passed in asks:
        seconds += passed
        if key in price and budget.affords(key, price[key], seconds):
            again = key in budget.spent
            budget.pay(key, price[key])
            first, total, pool = sum(price[k] for k in budget.spent), sum(budget.spent.values()), share * seconds
            assert total <= pool + first + 1e-6
            assert not again or total <= max(pool, first + pool / 4) + 1e-6


@settings(deadline=None)
@given(prices, st.integers(1, 4))
def test_nobody_starves(price: dict[str, float], stride: int) -> None:
    """All keys ask again and again; each gets its second reading by the time its fair share covers it."""
    budget, taken = Budget(0.05), dict.fromkeys(price, 0)
    keys = sorted(price, key=lambda key: price[key])
    fair = 0.05 / len(price)
    enough = 2 * 2 * max(price.values()) / fair
    for step in range(400):
        for key in keys if step % stride == 0 else keys[:1]:
            if budget.affords(key, price[key], enough * step / 396):
                budget.pay(key, price[key])
                taken[key] += 1
    assert min(taken.values()) >= 2


@settings(deadline=None)
@given(st.floats(1.0, 100.0))
def test_cheap_keys_are_not_blocked_by_a_dear_one(dear: float) -> None:
    """Cheap, always due, wants a fifth of its fair share: a refusal never lasts longer than a step or two."""
    budget, refused, longest = Budget(0.05), 0, 0
    first_covered = 2 * 0.0005 / 0.05
    for step in range(1500):
        seconds = first_covered * 2 + 0.1 * step
        for key, price in (("dear", dear), ("cheap", 0.0005)):
            allowed = budget.affords(key, price, seconds)
            if allowed:
                budget.pay(key, price)
            if key == "cheap":
                refused = 0 if allowed else refused + 1
                longest = max(longest, refused)
    assert longest <= 2
