"""The price list: readings that are really taken, and leave no trace in training, log, memory or budget."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loop_cases import CASES, Case, N, Training, case_named, mlp, rows, two_groups
from torch import Tensor
from watching import EVERYTHING, events, readings, watch

from cockpit_bench import Cockpit, at, batches
from cockpit_bench.panels import PANELS
from cockpit_bench.prices import Price, Prices
from cockpit_bench.readout import Readout
from cockpit_bench.testing.traces import bits, differences, objects_of, state_of
from instruments import catalogue
from instruments.needs import AFTER_STEP

PLAIN = CASES[0]
STANDARD = dict.fromkeys(PANELS["standard"], 1)


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quick is measured several times, for a better time; no test here is about time."""
    monkeypatch.setattr("cockpit_bench.prices.TRIES", 1)


def by_label(prices: Prices) -> dict[str, Price]:
    return {row.label: row for row in prices.rows}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_and_cockpit_are_as_before(case: Case) -> None:
    """Between backward and step, where most could be spoilt, and before the first step."""
    training = Training(case)
    sides = training.model, training.optimizers
    cockpit = watch(training, instruments=STANDARD, probe=batches(case.batch(0), case.batch(1)))

    def ours() -> list[Any]:
        """Memories, budget, records, and the seconds that the budget must pay for."""
        overhead = cockpit.clock.bucket("observe").seconds
        return [bits(cockpit.state_dict()["readout"]), len(cockpit.records), overhead]

    def look(batch: Any | None) -> Prices:
        before = [state_of(*sides), objects_of(*sides), *ours()]
        prices = cockpit.prices(batch)
        assert differences(before, [state_of(*sides), objects_of(*sides), *ours()]) == []
        return prices

    assert [row.label for row in look(case.batch(99)).rows] == list(STANDARD)
    assert cockpit.clock.wall == 0, "a preview starts no clock"
    for step in range(2):
        for micro in range(case.accumulate):
            batch, loss = training.backward(step, micro)
            cockpit.observe(batch, loss)
        look(None if step else batch)
        training.take_step()
    expected = Training(case).run(2)
    assert differences(state_of(*sides), state_of(expected.model, expected.optimizers)) == []
    assert set(cockpit.clock.tax) == {*STANDARD, "prices"}
    cockpit.close()


def test_every_instrument_has_a_price_and_leaves_no_trace() -> None:
    training = Training(case_named("dropout"))
    sides = training.model, training.optimizers
    cockpit = watch(training, probe=batches(rows(0)))
    cockpit.observe(*training.backward(0))
    before = [state_of(*sides), objects_of(*sides), bits(cockpit.state_dict()["readout"])]
    found = by_label(cockpit.prices())
    assert differences(before, [state_of(*sides), objects_of(*sides), bits(cockpit.state_dict()["readout"])]) == []
    assert set(found) == set(EVERYTHING)
    assert all(row.reason for row in found.values() if row.how == "failed")
    cockpit.close()


NO_NOISE = (PLAIN, case_named("attention"), Case("two micro-batches", mlp, two_groups, accumulate=2))


@pytest.mark.parametrize("case", NO_NOISE, ids=lambda case: case.name)
def test_counts_are_those_of_the_first_reading(case: Case) -> None:
    """The twin is a run that really takes its first step on that batch, with the same gradient."""
    held = batches(*map(case.batch, range(3)))
    batch = case.batch(0)
    repeated = Case(case.name, case.model, case.optimizers, case.loss, lambda step: batch, case.accumulate)
    for label in STANDARD:
        previewed = watch(Training(case), instruments={label: 1}, probe=held)  # what is checked once a run is in both
        (row,) = previewed.prices(batch).rows
        previewed.close()
        training = Training(repeated)
        alone = watch(training, instruments={label: 1}, probe=held)
        training.run(1, alone.observe)
        (reading,) = readings(alone, label)
        if catalogue.make(label).needs & AFTER_STEP:
            assert (row.how, row.products, row.gradients) == ("declared", 0, 0), label
        else:
            assert row.how == "measured", label
            assert (row.products, row.gradients) == (reading.cost["products"], reading.cost["gradients"]), label
        alone.close()


def test_what_needs_the_step_is_declared_at_its_own_estimate() -> None:
    cockpit = watch(Training(PLAIN), panel="standard")
    prices = cockpit.prices(rows(0))
    declared = {row.label: row for row in prices.rows if row.how == "declared"}
    assert {label: row.declared for label, row in declared.items()} == {
        "step/step_ratio": 4 / 3,
        "step/update_ratio": 0.05,
    }
    for row in declared.values():
        assert row.seconds == pytest.approx(row.declared * prices.gradient_seconds)
    cockpit.close()


def test_a_preview_leaves_the_first_readings_free() -> None:
    training = Training(PLAIN)
    cockpit = watch(training, instruments=STANDARD, budget=0.0)
    assert cockpit.prices(PLAIN.batch(0)).budget == 0.0
    training.run(2, cockpit.observe)
    for label in STANDARD:
        assert readings(cockpit, label)[0].status == "ok"
        assert "skipped" not in readings(cockpit, label)[0].provenance
    cockpit.close()


def test_curvature_is_priced_on_what_will_be_held() -> None:
    sharpness = {"curvature/sharpness": 1}
    given = watch(Training(PLAIN), instruments=sharpness, probe=batches(rows(0), rows(1), rows(2)))
    assert given.prices(rows(5)).held == 3 * N
    assert given.prices().held == 3 * N
    training = Training(PLAIN)
    collecting = watch(training, instruments=sharpness)
    prices = collecting.prices(rows(5))
    assert (prices.examples, prices.held) == (N, 512 // N * N)
    training.run(1, collecting.observe)
    assert collecting.prices().held == 512 // N * N
    assert collecting._observer.probes.held.examples == N, "what is held is collected by training alone"
    for cockpit in (given, collecting):
        cockpit.close()


def test_a_step_of_several_micro_batches() -> None:
    case = case_named("accumulation")
    cockpit = watch(Training(case), panel="light")
    assert cockpit.prices(case.batch(0)).examples == 3 * N
    cockpit.close()


def test_share_of_the_steps_that_are_due() -> None:
    panel = {"gradient/norm": 1, "batch/loss": 4, "network/weight_norm": at(0, 10, 300), "step/learning_rate": at(400)}
    short = watch(Training(PLAIN), panel=None, instruments=panel, steps=200)
    due = {row.label: row.due for row in short.prices(rows(0)).rows}
    assert due == {"gradient/norm": 1, "batch/loss": 0.25, "network/weight_norm": 0.01, "step/learning_rate": 0}
    open_ended = watch(Training(PLAIN), panel=None, instruments=panel)
    assert by_label(open_ended.prices(rows(0)))["network/weight_norm"].due == pytest.approx(3 / 1000)
    for cockpit in (short, open_ended):
        cockpit.close()


def test_the_best_of_several_quick_readings_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use of a model or an engine pays for what is set up once."""
    monkeypatch.setattr("cockpit_bench.prices.TRIES", 3)
    seen: list[float] = []
    real = Readout.take_now

    def counted(*args: Any, **kwargs: Any) -> Any:
        reading = real(*args, **kwargs)
        seen.append(reading.cost["seconds"])
        return reading

    monkeypatch.setattr(Readout, "take_now", counted)
    cockpit = watch(Training(PLAIN), panel=None, instruments={"network/weight_norm": 1})
    (found,) = cockpit.prices(rows(0)).rows
    assert len(seen) == 3
    assert found.seconds == min(seen)
    cockpit.close()


def row(label: str, how: Any, seconds: float, due: float, **more: Any) -> Price:
    counts = {"products": 0, "gradients": 0.0, "declared": 2.0, **more}
    return Price(label, how, seconds, due=due, **counts)


PRICES = Prices(
    (
        row("curvature/sharpness", "measured", 0.080, 0.025, products=7, gradients=1.0),
        row("step/step_ratio", "declared", 0.010, 0.5),
        row("my <own>", "failed", math.nan, 1.0, reason="no & never"),
    ),
    gradient_seconds=0.004,
    examples=64,
    held=512,
    budget=0.05,
)


def test_the_share_of_the_training_time() -> None:
    assert PRICES.share == pytest.approx((0.080 * 0.025 + 0.010 * 0.5) / 0.004)


def test_the_table() -> None:
    assert str(PRICES).splitlines() == [
        "one step's gradient takes 4 ms on 64 examples; curvature is read on 512",
        "instrument           one reading  in steps  products  gradients  declared  of steps  of training",
        "curvature/sharpness        80 ms        20         7          1       2 g     0.025        50.0%",
        "step/step_ratio         declared       2.5         -          -       2 g       0.5       125.0%",
        "my <own>                  failed         -         -          -       2 g         1            -",
        "all that is due: 175.0% on top of the training time; the budget is 5%",
        "declared: needs the optimizer's step itself; its own estimate, in g, is shown",
        "products: of a reading from the present memory; the first takes more than later ones",
        "failed: my <own>: no & never",
    ]


def test_the_table_in_a_notebook() -> None:
    page = PRICES._repr_html_()
    assert page.count("<tr>") == 4
    assert "50.0%" in page
    assert "my &lt;own&gt;" in page
    assert "no &amp; never" in page
    assert "<own>" not in page


def test_what_fails_is_a_row_and_not_an_error() -> None:
    def nameless(call: Any, batch: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(call(batch[0]), batch[1])  # one number: no examples in it

    cockpit = watch(Training(PLAIN), instruments=STANDARD, loss=nameless, strict=True)
    found = by_label(cockpit.prices(rows(0)))
    assert found["gradient/noise_scale"].how == "failed"
    assert found["gradient/noise_scale"].reason
    assert found["curvature/sharpness"].how == "measured"
    cockpit.close()


def test_a_price_that_cannot_be_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    def price(self: Any, view: Any) -> float:
        raise KeyError("planted")

    monkeypatch.setattr("instruments.step.step_ratio.StepRatio.price", price)
    cockpit = watch(Training(PLAIN), panel=None, instruments={"step/step_ratio": 1})
    (found,) = cockpit.prices(rows(0)).rows
    assert (found.how, found.reason) == ("failed", "KeyError: 'planted'")
    cockpit.close()


def test_what_refuses_a_model_refuses_it_here_too() -> None:
    case = case_named("batch norm")
    training = Training(case)
    cockpit = watch(training, instruments=STANDARD)
    batch, _ = training.backward(0)
    found = by_label(cockpit.prices(batch))
    for label in [label for label in STANDARD if not catalogue.make(label).needs & AFTER_STEP]:
        reading = cockpit.read(label, batch)
        assert (found[label].how == "failed") == (reading.status == "failed"), label
        assert found[label].reason == reading.reason
    assert "BatchNorm1d" in found["gradient/noise_scale"].reason
    cockpit.close()


@pytest.mark.parametrize(
    ("durations", "taken", "best"),
    [([5.0, 0.2, 0.1], 2, 0.2), ([0.4, 0.3, 0.2, 0.25], 4, 0.2), ([0.1, 0.6, 0.4], 3, 0.4)],
)
def test_the_first_gradient_does_not_count(
    monkeypatch: pytest.MonkeyPatch, durations: list[float], taken: int, best: float
) -> None:
    """It pays for what is set up once; then up to three are taken, while that is quick."""
    moment, left = [100.0], list(durations)

    def gradient(probe: Any, params: Any) -> Any:
        moment[0] += left.pop(0)
        return torch.zeros(()), [None] * len(params)

    monkeypatch.setattr("cockpit_bench.prices.TRIES", 3)
    monkeypatch.setattr("cockpit_bench.prices.time", SimpleNamespace(perf_counter=lambda: moment[0]))
    monkeypatch.setattr("cockpit_bench.prices._gradient", gradient)
    cockpit = watch(Training(PLAIN), panel=None)
    assert cockpit.prices(rows(0)).gradient_seconds == pytest.approx(best)
    assert len(durations) - len(left) == taken
    cockpit.close()


def test_running_out_of_memory_costs_the_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = torch.autograd.grad, []

    def small(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("create_graph") and not refused:
            refused.append(1)
            raise torch.OutOfMemoryError("planted")
        return real(outputs, *args, **kwargs)

    cockpit = watch(Training(PLAIN), panel=None, instruments={"curvature/sharpness": 1}, probe=batches(rows(0)))
    before = cockpit._observer.probes.held.extent
    monkeypatch.setattr("torch.autograd.grad", small)
    assert by_label(cockpit.prices())["curvature/sharpness"].how == "measured"
    assert refused
    assert cockpit._observer.probes.held.extent == before
    assert not events(cockpit, "probe_shrunk")
    cockpit.close()


def test_nothing_to_measure_on() -> None:
    cockpit = watch(Training(PLAIN))
    with pytest.raises(ValueError, match=r"pass a training batch: cockpit.prices\(batch\)"):
        cockpit.prices()
    with pytest.raises(ValueError, match="at least one example"):
        cockpit.prices((torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)))
    cockpit.close()


def test_switched_off_or_empty() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    off = Cockpit(model, optimizer, loss=PLAIN.loss, enabled=False)
    assert off.prices().rows == ()
    empty = Cockpit(model, optimizer, loss=PLAIN.loss, panel=None, sinks=[])
    assert str(empty.prices(rows(0))) == "no instruments, no price"
    empty.close()
