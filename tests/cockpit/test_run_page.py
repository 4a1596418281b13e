"""A run as a notebook shows it: what stands in the log stands in the table, escaped, and no matplotlib is asked for."""

import math
import pickle
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from loop_cases import CASES, Training
from watching import watch

from cockpit_bench import Event, Metrics, Outcome, Reading, at_least, read_run
from cockpit_bench.panels import PANELS
from cockpit_bench.runlog import Record, Run, new_header


class Table(HTMLParser):
    """The cells of the table, row by row, and the text round it; a tag that is not closed is seen."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        else:
            self.text.append(data)


UNITS = {"curvature/sharpness": {"outputs": {"sharpness": {"unit": "loss / parameter²"}}}}


def run_of(*records: Record) -> Run:
    header = new_header("in memory", instruments=UNITS)
    return Run(Path("a <folder>"), header, records, 0, {}, {"state": "running"}, {})


def sharpness(step: int, value: float, doubt: float = math.nan) -> Reading:
    return Reading("curvature/sharpness", step, 0.1 * step, "ok", {"sharpness": value}, {"sharpness": doubt})


OUTCOME = Outcome(
    "hit", 100, 10.0, 80, 8.0, 0.98, "target <reached>", {}, 12.5,
    {"curvature/sharpness": 0.5, "my/own": 0.1}, {"curvature/sharpness": 4},
)  # fmt: skip


def test_the_table() -> None:
    page = Table(
        run_of(
            sharpness(0, 9.0),
            sharpness(40, 12.3456, 0.0312),
            Reading("curvature/sharpness", 50, 5.0, "skipped", reason="over the budget"),
            Reading("my/own", 3, 0.3, "failed", reason="no <gradient>"),
            Reading("my/layers", 7, 0.7, "ok", {"a": np.array([3.0, 1.0, math.nan]), "b": [2.0], "c": math.inf}),
            Metrics(60, 6.0, {"valid_accuracy": 0.875}, "evaluation"),
            Event(60, 6.0, "clip"),
            OUTCOME,
        )._repr_html_()
    )
    assert page.rows == [
        ["instrument", "output", "last value", "±", "unit", "step", "readings", "tax"],
        ["curvature/sharpness", "sharpness", "12.35", "0.031", "loss / parameter²", "40", "2 ok, 1 skipped", "5.0%"],
        ["my/own", "failed", "no <gradient>", "", "", "3", "1 failed", "1.0%"],
        ["my/layers", "a", "3 values, 1 to 3", "", "", "7", "1 ok", "0.0%"],
        ["", "b", "2", "", "", "7", "", ""],
        ["", "c", "inf", "", "", "7", "", ""],
    ]
    assert page.text == [
        "a <folder>: hit at step 80, 8 s; 100 steps in 10 s of training",
        "valid_accuracy 0.875 at step 60",
        "reason: target <reached>",
        "observation took 600 ms, 6.0% of the training time; 4 readings were skipped, over the budget",
    ]


def test_a_run_that_goes_on() -> None:
    page = Table(run_of(sharpness(0, 1.0))._repr_html_())
    assert page.text == ["a <folder>: running"]
    assert page.rows[1][-1] == ""


@pytest.mark.parametrize("records", [(), (Metrics(0, 0.0, {"a": math.nan}, "user"),)])
def test_a_run_without_readings(records: tuple[Record, ...]) -> None:
    page = Table(run_of(*records)._repr_html_())
    assert page.text[-1] == "nothing was read"
    assert page.rows == []


def test_a_real_run_from_its_log(tmp_path: Path) -> None:
    training = Training(CASES[0])
    with watch(training, panel="standard", logdir=tmp_path / "run", target=at_least("accuracy", 0.5)) as cockpit:
        training.run(3, cockpit.observe)
        with cockpit.evaluating() as log:
            log(accuracy=0.75)
    run = read_run(tmp_path / "run")
    page = Table(run._repr_html_())
    assert re.match(r"run: hit at step 3, .* [mµ]?s; 3 steps in ", page.text[0])
    shown = {(row[0], row[1]): row for row in page.rows if row[0]}
    assert {label for label, _ in shown} == {"instrument", *PANELS["standard"]}
    norm = shown["gradient/norm", "norm"]
    assert norm[2] == f"{run['gradient/norm']['norm'].values[-1]:.4g}"
    assert norm[4:7] == ["loss / parameter", "2", "3 ok"]
    assert sum(len(run[label]) for label in run) == len(page.rows) - 1


def test_it_needs_no_matplotlib_and_no_torch(tmp_path: Path) -> None:
    watch(Training(CASES[0]), logdir=tmp_path / "run").close()
    code = (
        "import sys; from cockpit_bench import read_run; page = read_run(sys.argv[1])._repr_html_();"
        "sys.exit(not page.startswith('<div>') or 'matplotlib' in sys.modules or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_the_figure_shows_itself_at_its_own_size() -> None:
    """By the method that IPython asks for; without it a notebook prints the figure's size and no picture."""
    figure = run_of(sharpness(0, 1.0)).plot()
    picture = figure._repr_png_()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1600, 1000)
    assert pickle.loads(pickle.dumps(figure))._repr_png_()[:4] == b"\x89PNG"
