"""What the panel's instruments cost, measured before it is paid: `cockpit.prices(batch)`."""

import copy
import html
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cockpit_bench.cadence import Budget, Cadence
from cockpit_bench.clock import Clock
from cockpit_bench.observer import Observer
from cockpit_bench.readout import Readout, Station
from cockpit_bench.runlog import Reading
from cockpit_bench.tables import duration, html_table, share, text_table
from instruments.guard import untouched
from instruments.held import HeldBatches, is_empty
from instruments.layout import Layout
from instruments.needs import AFTER_STEP
from instruments.objective import Batch, examples_of
from instruments.probe import Probe
from instruments.view import View

Measured = Literal["measured", "declared", "failed"]
HEAD = ("instrument", "one reading", "in steps", "products", "gradients", "declared", "of steps", "of training")
TRIES, ENOUGH_SECONDS = 3, 1.0  # what is quick is measured up to three times, and the best counts
STEPS_AHEAD, MOST_STEPS = 1_000, 100_000


@dataclass(frozen=True)
class Price:
    """What one reading of one label costs.

    `seconds`, `products` and `gradients` are those of a reading that was really taken; where it was not, `seconds` is
    the declared price times the seconds of a gradient ("declared") or NaN ("failed", with the reason). `declared` is
    the instrument's own estimate of a usual reading, in g: gradients on the batch that it reads. `due` is the share of
    steps on which the cadence asks for a reading.
    """

    label: str
    how: Measured
    seconds: float
    products: int
    gradients: float
    declared: float
    due: float
    reason: str = ""


@dataclass(frozen=True)
class Prices:
    """The price list of a panel; `print` it, or let a notebook show it.

    `gradient_seconds` is the time of forward and backward on the batches of one step (`examples` of them), by which a
    price is also a number of training steps; the optimizer's own time and that of the data are not in it, so shares are
    upper estimates. Curvature was priced on `held` examples. Each instrument is priced alone: two that are due at the
    same step share what both need. `budget` is the share of the training time that may be spent.
    """

    rows: tuple[Price, ...]
    gradient_seconds: float
    examples: int
    held: int
    budget: float | None

    @property
    def share(self) -> float:
        """Time of all readings that are due, as a share of the training time, with no budget to stop them."""
        seconds = math.fsum(row.seconds * row.due for row in self.rows if row.how != "failed")
        return seconds / self.gradient_seconds

    def __str__(self) -> str:
        if not self.rows:
            return "no instruments, no price"
        return "\n".join([self._headline(), *text_table(self._cells()), *self._notes()])

    def _repr_html_(self) -> str:
        if not self.rows:
            return "<p>no instruments, no price</p>"
        notes = "<br>".join(map(html.escape, self._notes()))
        return f"<p>{html.escape(self._headline())}</p>{html_table(self._cells())}<p>{notes}</p>"

    def _headline(self) -> str:
        return (
            f"one step's gradient takes {duration(self.gradient_seconds)} on {self.examples or '?'} examples; "
            f"curvature is read on {self.held or '?'}"
        )

    def _cells(self) -> Sequence[tuple[str, ...]]:
        return [HEAD] + [
            (
                row.label,
                duration(row.seconds) if row.how == "measured" else row.how,
                _number(row.seconds / self.gradient_seconds),
                str(row.products) if row.how == "measured" else "-",
                _number(row.gradients) if row.how == "measured" else "-",
                f"{_number(row.declared)} g",
                f"{row.due:.3g}",
                share(row.seconds * row.due, self.gradient_seconds),
            )
            for row in self.rows
        ]

    def _notes(self) -> list[str]:
        budget = "no budget is set" if self.budget is None else f"the budget is {self.budget:.0%}"
        notes = [f"all that is due: {self.share:.1%} on top of the training time; {budget}"]
        if any(row.how == "declared" for row in self.rows):
            notes.append("declared: needs the optimizer's step itself; its own estimate, in g, is shown")
        if any(row.products for row in self.rows):
            notes.append("products: of a reading from the present memory; the first takes more than later ones")
        return notes + [f"failed: {row.label}: {row.reason}" for row in self.rows if row.how == "failed"]


NOTHING = Prices((), math.nan, 0, 0, None)


def price_list(
    observer: Observer,
    readout: Readout,
    clock: Clock,
    batch: Batch | None,
    steps: int | None,
    accumulate: int,
) -> Prices:
    """One reading of every instrument on the side: logged nowhere, paid by none, remembered by none.

    `batch` is a micro-batch of the training; without it the last step's or the held ones are used. ValueError when
    there is none. Once the clock runs, the time taken stands in the tax as "prices", which no budget pays for.
    """
    with clock.bucket("observe", key="prices") if clock.running else nullcontext():
        batches = _step_batches(observer, batch, accumulate)
        probes, loop = observer.probes, observer.loop
        held = _held_batches(probes.held, batches)
        with untouched(probes.module):
            seconds, loss = _train_once(probes.make(loop, batches, None), clock.sync)

            def probe() -> Probe:
                return probes.make(loop, batches, loss, held=_copy_of(held))

            ahead = _ahead(loop.step, steps)
            rows = [_price(station, probe, clock.sync, seconds, ahead) for station in readout.stations]
    return Prices(tuple(rows), seconds, sum(map(examples_of, batches)), held.examples, readout.budget.share)


def _step_batches(observer: Observer, batch: Batch | None, accumulate: int) -> Sequence[Batch]:
    last = observer.loop.last or observer.probes.held.batches[:1] * accumulate
    given = last if batch is None else [batch] * accumulate
    if not given:
        raise ValueError(
            "expected a batch to measure on, got none, and nothing was observed yet; pass a training batch: "
            "cockpit.prices(batch). Without one no reading can be taken"
        )
    if is_empty(given[0]):
        raise ValueError("expected a batch with at least one example, got an empty one; it would cost nothing")
    return given


def _held_batches(held: HeldBatches, batches: Sequence[Batch]) -> HeldBatches:
    """What curvature will be read on: the batches that are held, or as many like these as are going to be held."""
    if held.complete:
        return held
    expected = _copy_of(held)
    while not expected.complete:
        expected.offer(batches)
    return expected


def _copy_of(held: HeldBatches) -> HeldBatches:
    """With a list of its own: running out of memory here must not cost the run its batches."""
    twin = copy.copy(held)
    twin.batches = list(held.batches)
    return twin


def _train_once(probe: Probe, sync: Callable[[], None]) -> tuple[float, float]:
    """Seconds of forward and backward on the step's batches, and the loss; the gradient is left in `.grad`."""
    best, spent = math.inf, 0.0
    params = Layout.of(probe.module).params  # all that is trained, whatever the readings are restricted to
    with probe, probe.running(held=False, differentiable=False), torch.enable_grad():
        for attempt in range(TRIES + 1):
            sync()
            begun = time.perf_counter()
            loss, grads = _gradient(probe, params)
            sync()
            seconds = time.perf_counter() - begun
            spent += seconds
            if attempt:  # the first run of a model pays for what is set up once, which may be many times the rest
                best = min(best, seconds)
                if spent > ENOUGH_SECONDS:
                    break
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    return best, float(loss)


def _gradient(probe: Probe, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradient, one micro-batch after the other as in training, past whatever hangs on `.grad`."""
    total: Tensor = torch.zeros(())
    sums: list[Tensor | None] = [None] * len(params)
    for batch in probe.batches:
        loss = probe.objective.parts(probe.module, batch).loss / len(probe.batches)
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        sums = [new if old is None else old if new is None else old + new for old, new in zip(sums, grads, strict=True)]
        total = total + loss.detach().to(total)
    return total, sums


def _price(
    station: Station, probe: Callable[[], Probe], sync: Callable[[], None], gradient_seconds: float, ahead: range
) -> Price:
    label, instrument = station.label, station.instrument
    due = 0.0 if station.retired else _due(station.slot.due, ahead)
    if instrument.needs & AFTER_STEP:
        with probe() as seen:
            try:
                declared = instrument.price(View(seen, instrument.needs))
            except Exception as error:  # an instrument of somebody else's may raise anything
                return Price(label, "failed", math.nan, 0, 0.0, math.nan, due, f"{type(error).__name__}: {error}")
        return Price(label, "declared", declared * gradient_seconds, 0, 0.0, declared, due)
    best, spent = math.inf, 0.0
    for _ in range(TRIES):
        reading, declared = _reading(station, probe, sync)
        if reading.status != "ok":
            return Price(label, "failed", math.nan, 0, 0.0, declared, due, reading.reason)
        best, spent = min(best, reading.cost["seconds"]), spent + reading.cost["seconds"]
        if spent > ENOUGH_SECONDS:
            break
    return Price(label, "measured", best, int(reading.cost["products"]), reading.cost["gradients"], declared, due)


def _reading(station: Station, probe: Callable[[], Probe], sync: Callable[[], None]) -> tuple[Reading, float]:
    """A reading by a readout of its own, from a copy of the station's memory, and the price that is declared."""
    aside = Readout([station.slot], Budget(None), Clock(sync=sync), lambda record: None, strict=False)
    (twin,) = aside.stations
    twin.load_state_dict(copy.deepcopy(station.state_dict()))
    twin.skipped = 0
    with probe() as seen:
        reading = aside.take_now(twin.label, twin.instrument, seen, fresh=False)
    return reading, math.nan if twin.price is None else twin.price


def _ahead(step: int, steps: int | None) -> range:
    """The steps that the cadences are asked about: the rest of the run, or a thousand where its end is not known."""
    left = steps - step if steps is not None and steps > step else STEPS_AHEAD
    return range(step, step + min(left, MOST_STEPS))


def _due(cadence: Cadence, ahead: range) -> float:
    return sum(map(bool, map(cadence, ahead))) / len(ahead)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
