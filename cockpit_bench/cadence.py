"""When an instrument is due (a function of the step), and whether a due reading can be paid for."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from types import MappingProxyType
from typing import Any

Cadence = Callable[[int], bool]
PAY_BACK = 0.75  # the part of the budget that pays for first readings, until they are paid


@dataclass(frozen=True)
class Every:
    """Due at `start`, `start + n`, `start + 2 n`, ..."""

    n: int
    start: int = 0

    def __call__(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.n == 0


@dataclass(frozen=True)
class At:
    """Due at exactly these steps."""

    steps: frozenset[int]

    def __call__(self, step: int) -> bool:
        return step in self.steps


@dataclass(frozen=True)
class Spread:
    """Due `readings` times in `steps` steps, as evenly as whole steps allow; the rhythm goes on in a longer run.

    Reading k falls on the first step at or after k * steps / readings.
    """

    readings: int
    steps: int

    def __call__(self, step: int) -> bool:
        return step * self.readings % self.steps < self.readings


@dataclass(frozen=True)
class Never:
    """Never due."""

    def __call__(self, step: int) -> bool:
        return False


never = Never()


def every(n: int, start: int = 0) -> Every:
    """Due every n steps, first at `start`."""
    return Every(_whole(n, 1, "a number of steps between readings"), _whole(start, 0, "a first step"))


def at(*steps: int) -> At:
    """Due at the steps named."""
    return At(frozenset(_whole(step, 0, "steps") for step in steps))


def spread(readings: int, steps: int) -> Spread:
    """That many readings over a run of that many steps, the first at step 0, at most one per step."""
    return Spread(_whole(readings, 1, "a number of readings"), _whole(steps, 1, "the steps of the run"))


def as_cadence(cadence: int | Cadence) -> Cadence:
    """An int n means steps 0, n, 2n, ...; a function of the step is taken as it is."""
    if callable(cadence):
        return cadence
    return every(cadence)


def _whole(value: Any, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(
            f"expected {what}, a whole number of at least {least}, got {value!r}; "
            "write an int n for steps 0, n, 2n, ..., or every(n), at(0, 10), spread(40, steps), never"
        )
    return int(value)


def water_level(pool: float, others: Iterable[float]) -> float:
    """The level L with sum_j min(others_j, L) + L = pool.

    That is the fair share of one more key: who took less than L leaves the rest to those who want more.
    """
    poured = 0.0
    spent = sorted(others)
    for index, amount in enumerate(spent):
        level = (pool - poured) / (len(spent) - index + 1)
        if level <= amount:
            return level
        poured += amount
    return pool - poured


class Budget:
    """Keeps observation within a share of the training time, and divides that share fairly among the keys.

    The pool is `share` times the training seconds so far, less `overhead`: the seconds of observation that no key is
    billed for. A key's first reading is always allowed, and paid back out of what the pool collects later. After it a
    reading must satisfy two rules:

    - the key, its first reading included, stays within its fair share of the pool (`water_level`);
    - all keys together stay within the pool, less what is set aside for keys that were refused and would have spent
      less even with their reading. First readings count as much as the part PAY_BACK of the pool can carry.

    With F seconds of first readings, the second rule bounds the whole by the larger of the pool and F plus a quarter of
    the pool: observation returns to its share once the pool reaches 4/3 F, and is within 1.2 times its share when 0.95
    of the pool reaches F. Fair shares alone would bound nothing, because a key may use what others leave and those may
    then claim it. Setting aside keeps the bound from starving a dear key among cheap ones, and the last quarter keeps
    cheap ones alive while dear first readings are paid back. None as share means no limit.
    """

    def __init__(self, share: float | None) -> None:
        if share is not None and (isinstance(share, bool) or not 0 <= share <= 1):
            raise ValueError(
                f"expected a share of the training time between 0 and 1, or None for no limit, got {share!r}; "
                "write 0.05 for five per cent. With another number observation would never or always be paid for"
            )
        self.share = share
        self.overhead = 0.0
        self._spent: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._waiting: dict[str, float] = {}
        self._totals = (0.0, 0.0)  # seconds of first readings, and of all others

    @property
    def spent(self) -> Mapping[str, float]:
        """Seconds paid by key, first readings included."""
        return MappingProxyType(self._spent)

    def affords(self, key: str, expected_seconds: float, training_seconds: float) -> bool:
        """Whether a reading of that price can be taken now. A refused key is remembered until it pays."""
        if self.share is None or key not in self._spent:
            return True
        pool = max(0.0, self.share * training_seconds - self.overhead)
        allowed = self._within_cap(expected_seconds, pool) and self._fair(key, expected_seconds, pool)
        if not allowed:
            self._waiting[key] = expected_seconds
        return allowed

    def _within_cap(self, seconds: float, pool: float) -> bool:
        """The second rule, before anything is set aside: asked first because it is cheap and refuses most."""
        first, later = self._totals
        return later + min(first, PAY_BACK * pool) + seconds <= pool

    def _fair(self, key: str, seconds: float, pool: float) -> bool:
        after = self._spent[key] + seconds
        set_aside = math.fsum(
            price for other, price in self._waiting.items() if other != key and self._spent[other] + price < after
        )
        if not self._within_cap(seconds + set_aside, pool):
            return False
        return after <= water_level(pool, (spent for other, spent in self._spent.items() if other != key))

    def pay(self, key: str, seconds: float) -> None:
        """Book what a reading took, whether or not it was worth it."""
        self._first.setdefault(key, seconds)
        self._spent[key] = self._spent.get(key, 0.0) + seconds
        self._waiting.pop(key, None)
        self._add_up()

    def _add_up(self) -> None:
        first = math.fsum(self._first.values())
        self._totals = (first, math.fsum(self._spent.values()) - first)

    def state_dict(self) -> dict[str, Any]:
        """What was paid, as plain JSON types: a resumed run must not get its first readings free again."""
        return {"spent": dict(self._spent), "first": dict(self._first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was paid."""
        self._spent = dict(state["spent"])
        self._first = dict(state["first"])
        self._waiting = {}
        self._add_up()
