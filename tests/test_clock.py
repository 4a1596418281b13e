"""Buckets that add up to the wall time, and a sync only where training meets off-clock time."""

import json
import random
import time
from collections.abc import Iterator

import pytest

from cockpit_bench.clock import OFF_CLOCK_BUCKETS, TRAINING_BUCKETS, Clock

EIGHT = ("data", "forward", "backward", "update", "observe", "evaluate", "log", "checkpoint")


class Hand:
    """A clock whose hand the test moves."""

    def __init__(self) -> None:
        self.moment = 1000.0

    def __call__(self) -> float:
        return self.moment

    def move(self, seconds: float) -> None:
        self.moment += seconds


def fail_after(seconds: float, hand: Hand) -> None:
    hand.move(seconds)
    raise ZeroDivisionError


@pytest.fixture
def hand() -> Hand:
    return Hand()


def test_an_enclosing_bucket_pauses(hand: Hand) -> None:
    clock = Clock(now=hand)
    with clock.bucket("forward"):
        hand.move(1)
        with clock.bucket("observe"):
            hand.move(2)
            with clock.bucket("log"):
                hand.move(4)
            hand.move(8)
        hand.move(16)
    hand.move(32)
    assert clock.seconds == {"forward": 17, "observe": 10, "log": 4}
    assert (clock.other, clock.wall, clock.training) == (32, 63, 49)


def test_a_running_bucket_counts_up_to_now(hand: Hand) -> None:
    clock = Clock(now=hand)
    with clock.bucket("forward"):
        hand.move(1)
        assert clock.seconds["forward"] == clock.wall == clock.training == 1
        hand.move(1)
        with clock.bucket("evaluate"):
            hand.move(3)
            assert (clock.training, clock.wall) == (2, 5)


def test_start_and_stop(hand: Hand) -> None:
    clock = Clock(now=hand)
    hand.move(1)
    assert clock.wall == 0
    clock.start()
    hand.move(2)
    clock.start()
    hand.move(4)
    clock.stop()
    hand.move(8)
    clock.stop()
    assert (clock.wall, clock.other) == (6, 6)
    with clock.bucket("forward"):
        hand.move(16)
        clock.stop()
        hand.move(32)
    hand.move(64)
    assert (clock.wall, clock.seconds) == (22, {"forward": 16})


def test_a_bucket_starts_the_clock(hand: Hand) -> None:
    clock = Clock(now=hand)
    hand.move(5)
    with clock.bucket("data"):
        hand.move(1)
    assert (clock.wall, clock.other) == (1, 0)


def test_an_exception_leaves_it_consistent(hand: Hand) -> None:
    clock = Clock(now=hand)
    with pytest.raises(ZeroDivisionError), clock.bucket("forward"), clock.bucket("observe"):
        fail_after(1, hand)
    hand.move(2)
    assert (clock.seconds, clock.other) == ({"forward": 0, "observe": 1}, 2)


def test_a_failing_sync_leaves_it_consistent(hand: Hand) -> None:
    fails = [False, True, True, False]

    def sync() -> None:
        if fails.pop(0):
            raise RuntimeError("device lost")

    clock = Clock(sync=sync, now=hand)
    with pytest.raises(RuntimeError), clock.bucket("observe"):
        hand.move(1)
    with pytest.raises(RuntimeError), clock.bucket("observe"):
        pytest.fail("a bucket whose sync failed was entered")
    hand.move(2)
    with clock.bucket("update"):
        hand.move(4)
    assert clock.seconds == {"observe": 1, "update": 4}
    assert clock.other == 2


def test_leaving_an_outer_bucket_leaves_the_inner_one_too(hand: Hand) -> None:
    clock = Clock(now=hand)
    abandoned = clock.bucket("update")
    with clock.bucket("training"):
        abandoned.__enter__()  # an optimizer hook whose other half never runs
        hand.move(1)
    hand.move(2)
    abandoned.__exit__(None, None, None)
    hand.move(4)
    assert (clock.seconds, clock.other) == ({"update": 1, "training": 0}, 6)


def test_sync_only_where_the_sides_meet(hand: Hand) -> None:
    calls: list[str] = []
    clock = Clock(sync=lambda: calls.append("sync"), now=hand)

    def enter(name: str, expected: int) -> None:
        clock.bucket(name).__enter__()
        assert len(calls) == expected, f"into {name}"

    def leave(name: str, expected: int) -> None:
        clock.bucket(name).__exit__(None, None, None)
        assert len(calls) == expected, f"out of {name}"

    enter("forward", 0)
    enter("backward", 0)
    enter("observe", 1)
    enter("log", 1)
    leave("log", 1)
    enter("forward", 2)
    leave("forward", 3)
    leave("observe", 4)
    leave("backward", 4)
    leave("forward", 4)
    enter("evaluate", 5)
    leave("evaluate", 6)


def test_the_wait_belongs_to_the_side_that_queued_the_work(hand: Hand) -> None:
    clock = Clock(sync=lambda: hand.move(1), now=hand)
    with clock.bucket("forward"):
        hand.move(2)
        with clock.bucket("observe"):
            hand.move(4)
    assert clock.seconds == {"forward": 3, "observe": 5}


def test_tax_by_key(hand: Hand) -> None:
    clock = Clock(now=hand)
    for seconds, key in ((1, "curvature/sharpness"), (2, "gradient/norm"), (4, "curvature/sharpness"), (8, None)):
        with clock.bucket("observe", key=key):
            hand.move(seconds)
    assert clock.tax == {"curvature/sharpness": 5, "gradient/norm": 2}
    assert clock.seconds == {"observe": 15}


def test_misuse_is_named() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match=r"expected one of the buckets data, .*got 'foward'"):
        clock.bucket("foward")
    with pytest.raises(ValueError, match="key only with 'observe'"):
        clock.bucket("log", key="gradient/norm")


def test_totals_survive_a_resume(hand: Hand) -> None:
    first = Clock(now=hand)
    first.start()
    hand.move(1)
    for name in ("forward", "log"):
        with first.bucket(name):
            hand.move(2)
    with first.bucket("observe", "gradient/norm"):
        hand.move(4)
    state = json.loads(json.dumps(first.state_dict()))
    hand.move(100)
    second = Clock(now=hand)
    with second.bucket("data"):
        hand.move(50)
    second.load_state_dict(state)
    with second.bucket("forward"):
        hand.move(8)
    assert second.seconds == {"data": 0, "forward": 10, "log": 2, "observe": 4}
    assert second.tax == {"gradient/norm": 4}
    assert (second.other, second.training, second.wall) == (1, 11, 17)


def nested(clock: Clock, hand: Hand, dice: random.Random, depth: int) -> Iterator[None]:
    for _ in range(dice.randrange(4)):
        hand.move(dice.random())
        with clock.bucket(dice.choice(TRAINING_BUCKETS + OFF_CLOCK_BUCKETS)):
            hand.move(dice.random())
            if depth:
                yield from nested(clock, hand, dice, depth - 1)
            yield


@pytest.mark.parametrize("seed", range(20))
def test_buckets_and_other_add_up_to_the_wall_time(hand: Hand, seed: int) -> None:
    clock = Clock(now=hand)
    clock.start()
    for _ in nested(clock, hand, random.Random(seed), 4):
        assert sum(clock.seconds.values()) + clock.other == pytest.approx(hand.moment - 1000, abs=1e-9)
        assert clock.wall == pytest.approx(hand.moment - 1000, abs=1e-9)
        off_clock = sum(clock.seconds.get(name, 0.0) for name in OFF_CLOCK_BUCKETS)
        assert clock.training == pytest.approx(clock.wall - off_clock, abs=1e-9)


def test_planted_sleeps_are_found_within_5_ms() -> None:
    clock, slept = Clock(), dict[str, float]()
    clock.start()
    began = time.perf_counter()
    for index, name in enumerate(EIGHT):
        with clock.bucket(name):
            before = time.perf_counter()
            time.sleep(0.01 * (index + 1))
            slept[name] = time.perf_counter() - before  # a busy machine sleeps longer than it was asked to
    wall = time.perf_counter() - began
    assert clock.seconds == pytest.approx(slept, abs=0.005)
    assert min(slept[name] - 0.01 * (index + 1) for index, name in enumerate(EIGHT)) > -0.001
    assert clock.wall == pytest.approx(wall, abs=0.005)


def test_a_bucket_costs_less_than_3_microseconds() -> None:
    clock, best = Clock(sync=lambda: None), float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            with clock.bucket("observe", "gradient/norm"):
                pass
        best = min(best, (time.perf_counter() - began) / 1000)
    assert best < 3e-6
