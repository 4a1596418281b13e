"""Lines on a terminal and elsewhere; nothing strange stops it."""

import io
import math
import os
import pty
import re
from dataclasses import dataclass

import pytest

from cockpit_bench.runlog import Event, Metrics, Outcome, Reading, Record
from cockpit_bench.sinks import ConsoleSink


@dataclass(frozen=True)
class Goal:
    metric: str = "valid_accuracy"
    value: float = 0.97

    def __str__(self) -> str:
        return f"{self.metric} >= {self.value}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TerminalBytes(io.BytesIO):
    def isatty(self) -> bool:
        return True


class Ticks:
    """A clock the test moves."""

    def __init__(self) -> None:
        self.moment = 100.0

    def __call__(self) -> float:
        return self.moment


def loss(step: int, value: float = 0.5, cost: float = 0.0) -> Reading:
    return Reading("batch/loss", step, 0.1 * step, "ok", {"loss": value}, cost={"seconds": cost})


def evaluation(step: int, value: float = 0.9) -> Metrics:
    return Metrics(step, 0.1 * step, {"valid_accuracy": value, "valid_loss": 0.2}, "evaluation")


def test_a_full_line() -> None:
    stream, ticks = io.StringIO(), Ticks()
    sink = ConsoleSink(stream, target=Goal(), steps=1000, now=ticks)
    sink.write(loss(0))
    for record in (
        loss(50, 0.25, cost=0.1),
        Reading("curvature/preconditioned_sharpness", 50, 5.0, "ok", {"rho": 0.84, "top": 3.0}),
        Reading("gradient/noise_scale", 50, 5.0, "ok", {"noise_scale": 132.0}),
    ):
        sink.write(record)
    ticks.moment += 20.0
    sink.write(evaluation(50))
    first, last = stream.getvalue().splitlines()
    assert first == "step 0/1000  loss 0.5"
    assert last == (
        "step 50/1000  loss 0.25  valid_accuracy 0.9 (target 0.97)  rho 0.84  noise 132  tax 2.0%  eta 0:06:20"
    )


def test_after_the_target_is_hit() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(stream, target=Goal(), every_seconds=0.0, now=Ticks())
    sink.write(evaluation(80, 0.98))
    sink.write(Event(80, 8.0, "target_hit", {"value": 0.98}))
    sink.write(loss(90))
    assert stream.getvalue().splitlines()[1] == "step 80: target_hit value=0.98"
    assert stream.getvalue().splitlines()[-1] == (
        "step 90  loss 0.5  valid_accuracy 0.98 (target 0.97)  hit at step 80 (8 s)"
    )


def test_only_readings_that_are_ok_are_shown() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(stream, every_seconds=0.0)
    sink.write(Reading("batch/loss", 1, 0.1, "failed", {"loss": 1.0}))
    assert stream.getvalue() == "step 1\n"


def test_without_a_target_all_metrics_are_shown() -> None:
    stream = io.StringIO()
    ConsoleSink(stream).write(evaluation(3))
    assert stream.getvalue() == "step 3  valid_accuracy 0.9  valid_loss 0.2\n"


def test_plain_lines_are_rationed() -> None:
    stream, ticks = io.StringIO(), Ticks()
    sink = ConsoleSink(stream, now=ticks)
    for step in range(100):
        ticks.moment = 100.0 + 0.1 * step
        sink.write(loss(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["0", "50"]
    sink.write(evaluation(100))
    sink.write(Metrics(100, 10.0, {"tokens_per_second": 1.0}, "user"))
    assert len(stream.getvalue().splitlines()) == 3


def test_events_worth_seeing_get_their_own_line() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(stream, now=Ticks())
    sink.write(loss(0))
    for name in ("clip", "skipped_step", "retired", "clip"):
        sink.write(Event(1, 0.1, name, {"instrument": "my/own"}))
    assert stream.getvalue().splitlines()[1:] == ["step 1: retired instrument=my/own"]


def test_a_terminal_has_one_line_that_updates_itself() -> None:
    stream, ticks = Terminal(), Ticks()
    sink = ConsoleSink(stream, now=ticks)
    for step in range(3):
        sink.write(loss(step))
        ticks.moment += 0.3
    ticks.moment -= 0.2
    sink.write(loss(3))
    sink.close()
    sink.close()
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert [part.rstrip() for part in text.split("\r")[1:]] == [f"step {step}  loss 0.5" for step in range(3)]
    assert {len(part.rstrip("\n")) for part in text.split("\r")[1:]} == {79}


def test_an_event_on_a_terminal_leaves_no_rest_of_the_line() -> None:
    stream = Terminal()
    sink = ConsoleSink(stream, now=Ticks())
    sink.write(loss(0))
    sink.write(Event(1, 0.1, "retired"))
    assert stream.getvalue().endswith("\r" + " " * 79 + "\rstep 1: retired \n")


def test_the_line_is_cut_to_a_real_terminal() -> None:
    master, slave = pty.openpty()
    os.system(f"stty cols 20 < {os.ttyname(slave)}")
    with open(slave, "w") as stream:
        sink = ConsoleSink(stream, steps=1000)
        sink.write(evaluation(3))
        assert os.read(master, 1000) == b"\rstep 3/1000  valid_"
    os.close(master)


def said(outcome: Outcome, *before: Record, target: Goal | None = None, folder: str | None = None) -> list[str]:
    """The closing block, without what was printed before it."""
    stream = io.StringIO()
    sink = ConsoleSink(stream, target=target, folder=folder, now=Ticks())
    for record in before:
        sink.write(record)
    begun = len(stream.getvalue())
    sink.write(outcome)
    return stream.getvalue()[begun:].splitlines()


def test_the_summary() -> None:
    tax = {
        "batch/loss": 0.2,
        "curvature/sharpness": 0.9,
        "step/learning_rate": 0.004,
        "gradient/norm": 0.005,
        "network/weight_norm": 0.0,
        "x": math.nan,
    }
    skips = {"curvature/sharpness": 12, "network/weight_norm": 3}
    outcome = Outcome("hit", 100, 10.0, 80, 8.0, 0.981, "target reached", {}, 12.5, tax, skips)
    lines = said(
        outcome,
        Reading("curvature/smallest", 0, 0.0, "failed", reason="no second derivative"),
        Reading("gradient/noise_scale", 0, 0.0, "failed", reason="BatchNorm1d couples examples"),
        Event(2, 0.2, "retired", {"instrument": "gradient/noise_scale", "failures": 3}),
        Reading("curvature/smallest", 10, 1.0, "ok"),
        target=Goal(),
        folder="runs/" + "x" * 90,
    )
    assert lines == [
        "hit at step 80 (8 s), target valid_accuracy >= 0.97, best 0.981",
        "reason   target reached",
        "steps    100 in 10 s of training, 12.5 s in all",
        "tax      11.1% of the training time, 15 readings skipped",
        "          9.0%  curvature/sharpness                            12 skipped",
        "          2.0%  batch/loss",
        "          0.0%  network/weight_norm                             3 skipped",
        "          0.1%  3 more, each below 0.1%",
        "failed   curvature/smallest: no second derivative",
        "retired  gradient/noise_scale at step 2: BatchNorm1d couples examples",
        "log      runs/" + "x" * 90,
    ]


def test_of_many_instruments_the_dearest_have_a_line() -> None:
    tax = {f"mine/number_{n:02}": 0.1 + 0.01 * n for n in range(30)}
    outcome = Outcome("done", 9, 10.0, None, None, None, "", {}, 20.0, tax, {"mine/number_03": 2})
    shown = [line.split()[:2] for line in said(outcome)[3:]]
    assert [name for _, name in shown[:12]] == [f"mine/number_{n}" for n in range(29, 17, -1)]
    assert shown[12] == ["1.3%", "mine/number_03"], "what was skipped is always told"
    assert shown[13:] == [["32.0%", "17"]]
    assert said(outcome)[-1].endswith("17 more, each below 2.8%")


def test_the_summary_of_nothing() -> None:
    bare = Outcome("error", 0, 0.0, None, None, None, "", {}, 0.0, {})
    assert said(bare) == ["error", "steps    0 in 0 s of training, 0 s in all"]


def test_the_summary_fits_a_terminal_and_its_path_can_be_copied() -> None:
    long = "family/" + "n" * 90
    outcome = Outcome("miss", 9, 1.0, None, None, None, "because " * 20, {}, 2.0, {long: 0.5}, {long: 10**6})
    failed = Reading(long, 0, 0.0, "failed", reason="why " * 40)
    lines = said(outcome, failed, target=Goal("m" * 90), folder="/" + "f" * 90)
    assert max(map(len, lines[:-1])) <= 79
    assert " ".join(" ".join(lines).split()).count("why") == 40, "a reason is not cut where it matters"
    assert lines[-1] == "log      /" + "f" * 90
    (tax,) = (line for line in lines if "50.0%  family/nnn" in line)
    assert tax.endswith("...  1000000 skipped")


ODD: list[Record] = [
    Reading("batch/loss", 1, math.nan, "ok", {}, cost={"seconds": math.inf}),
    Reading("batch/loss", 1, math.inf, "ok", {"loss": [1.0, 2.0]}, cost={"seconds": 1.0}),
    Reading("batch/loss", 1, 1.0, "failed", {"loss": 1.0}),
    Reading("curvature/preconditioned_sharpness", 1, 1.0, "ok", {"rho": math.nan}),
    Reading("gradient/noise_scale", 0, 0.0, "ok", {"noise_scale": 10**400}),
    Metrics(0, -1.0, {"valid_accuracy": math.nan}, "evaluation"),
    Event(1, 1.0, "target_hit", {"ρ": "日本\n\x1b[2J"}),
    Outcome("diverged", 1, math.nan, None, math.nan, math.nan, "loss is ∞\n", {}, math.nan, {"x": math.inf}),
]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_nothing_strange_stops_it(encoding: str, terminal: bool) -> None:
    raw = TerminalBytes() if terminal else io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    sink = ConsoleSink(stream, target=Goal("ρ"), steps=10, every_seconds=0.0)
    for record in ODD:
        sink.write(record)
    sink.close()
    text = raw.getvalue().decode(encoding)
    assert "\x1b" not in text
    assert re.search(r"loss is (∞|\\u221e)", text)
    assert "rho nan" in text


def test_a_short_run_whose_budget_read_little_is_told_what_to_do() -> None:
    few = Outcome("done", 100, 10.0, None, None, None, "", {}, 12.0, {"a/b": 0.5}, {"a/b": 90})
    many = Outcome("done", 100, 10.0, None, None, None, "", {}, 12.0, {"a/b": 0.5}, {"a/b": 99, "c/d": 99})
    long = Outcome("done", 100, 100.0, None, None, None, "", {}, 120.0, {"a/b": 0.5}, {"a/b": 99, "c/d": 99})
    assert [any("budget=None" in line for line in said(outcome)) for outcome in (few, many, long)] == [
        False,
        True,
        False,
    ]
