"""Where the time of a run goes: buckets that add up to the wall time.

Training time (`data`, `forward`, `backward`, `update`, `training` and whatever no bucket claims) is what counts
towards a target. Off-clock time (`observe`, `evaluate`, `log`, `checkpoint`) is measured beside it and does not count.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

TRAINING_BUCKETS = ("data", "forward", "backward", "update", "training")
OFF_CLOCK_BUCKETS = ("observe", "evaluate", "log", "checkpoint")
_OTHER = "other"
T = TypeVar("T")


def _no_device() -> None:
    """The host's own work is done when it is done."""


class Bucket:
    """The account of one kind of time and the context manager that charges it. Get one from `Clock.bucket`."""

    __slots__ = ("_clock", "key", "name", "off_clock", "seconds")

    def __init__(self, clock: "Clock", name: str, key: str | None) -> None:
        self._clock = clock
        self.name = name
        self.key = key
        self.off_clock = name in OFF_CLOCK_BUCKETS
        self.seconds = 0.0

    def __enter__(self) -> "Bucket":
        self._clock._enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock._leave(self)


class Clock:
    """A stopwatch with nested buckets. Every moment belongs to the innermost open bucket, or to `other`.

    `sync` waits for the device. It is called, before the time is read, exactly where training time meets off-clock
    time, so queued work is billed to the side that queued it and the host never waits inside training.
    """

    def __init__(self, *, sync: Callable[[], None] | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        self.sync = sync or _no_device
        self._now = now
        self._accounts: dict[tuple[str, str | None], Bucket] = {}
        self._other = Bucket(self, _OTHER, None)
        self._stack = [self._other]
        self._mark: float | None = None

    @property
    def waits(self) -> bool:
        """Whether the host waits for a device where training time meets off-clock time."""
        return self.sync is not _no_device

    @property
    def running(self) -> bool:
        """Whether time is being counted."""
        return self._mark is not None

    def start(self) -> None:
        """Start, or go on after `stop`. The first bucket does this by itself."""
        if self._mark is None:
            self._mark = self._now()

    def stop(self) -> None:
        """Stop counting; the totals stay."""
        self._charge()
        self._mark = None

    def bucket(self, name: str, key: str | None = None) -> Bucket:
        """Charge the time of a `with` block to a bucket; the enclosing bucket pauses.

        `key`, for `observe` only, bills the time to one instrument as well: see `tax`.
        """
        bucket = self._accounts.get((name, key))
        return bucket if bucket is not None else self._open(name, key)

    def timed(self, items: Iterable[T], name: str) -> Iterator[T]:
        """The items, the time to get each of them billed to a bucket."""
        iterator = iter(items)
        while True:
            with self.bucket(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _open(self, name: str, key: str | None) -> Bucket:
        if name not in TRAINING_BUCKETS + OFF_CLOCK_BUCKETS:
            known = ", ".join(TRAINING_BUCKETS + OFF_CLOCK_BUCKETS)
            raise ValueError(f"expected one of the buckets {known}, got {name!r}; time in it would count for nothing")
        if key is not None and name != "observe":
            raise ValueError(f"expected a key only with 'observe', got {key!r} with {name!r}; leave the key out")
        return self._accounts.setdefault((name, key), Bucket(self, name, key))

    def _charge(self) -> None:
        if self._mark is not None:
            moment = self._now()
            self._stack[-1].seconds += moment - self._mark
            self._mark = moment

    def _enter(self, bucket: Bucket) -> None:
        if self._mark is None:
            self._mark = self._now()
        if bucket.off_clock is not self._stack[-1].off_clock:
            self.sync()
        self._charge()
        self._stack.append(bucket)

    def _leave(self, bucket: Bucket) -> None:
        stack = self._stack
        depth = len(stack) - 1
        while stack[depth] is not bucket:
            if depth == 0:
                return  # it was left already, together with a bucket around it
            depth -= 1
        try:
            if stack[depth - 1].off_clock is not stack[-1].off_clock:
                self.sync()
        finally:
            self._charge()
            del stack[depth:]

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds by bucket, without what was nested in other buckets, up to now."""
        self._charge()
        totals: dict[str, float] = {}
        for bucket in self._accounts.values():
            totals[bucket.name] = totals.get(bucket.name, 0.0) + bucket.seconds
        return totals

    @property
    def tax(self) -> Mapping[str, float]:
        """Seconds of observation by key."""
        self._charge()
        return {bucket.key: bucket.seconds for bucket in self._accounts.values() if bucket.key is not None}

    @property
    def other(self) -> float:
        """Seconds since the start that no bucket claimed. They count as training."""
        self._charge()
        return self._other.seconds

    @property
    def wall(self) -> float:
        """Seconds since the start, stops left out: the sum of all buckets and `other`."""
        return self.training + sum(bucket.seconds for bucket in self._accounts.values() if bucket.off_clock)

    @property
    def training(self) -> float:
        """Seconds on the training clock: the wall time without the off-clock buckets."""
        self._charge()
        on_clock = sum(bucket.seconds for bucket in self._accounts.values() if not bucket.off_clock)
        return on_clock + self._other.seconds

    def state_dict(self) -> dict[str, Any]:
        """The totals as plain JSON types, so that a resumed run goes on counting where it stopped."""
        self._charge()
        accounts = [[bucket.name, bucket.key, bucket.seconds] for bucket in self._accounts.values()]
        return {"other": self._other.seconds, "accounts": accounts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the totals; buckets that are open stay open and count on from now."""
        self._charge()
        for bucket in self._accounts.values():
            bucket.seconds = 0.0
        self._other.seconds = float(state["other"])
        for name, key, seconds in state["accounts"]:
            self.bucket(name, key).seconds = float(seconds)
