"""A run in one line, and its arrays by their kind in a table; nothing to install for it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cockpit_bench.runlog import Header, Outcome, Reading, Run
from cockpit_bench.runlog.page import headline

TRIAL = {"workload": "digits", "algorithm": "adam", "seed": 3}


def outcome(**changes: Any) -> Outcome:
    fields = {
        "status": "hit", "step": 50, "seconds": 0.5, "hit_step": 20, "hit_seconds": 0.2, "best": 0.95, "reason": "",
        "buckets": {}, "wall": 0.8, "tax": {},
    }  # fmt: skip
    return Outcome(**{**fields, **changes})


@pytest.mark.parametrize(
    ("records", "trial", "status", "text"),
    [
        ([], {}, {"state": "running"}, "x: running"),
        ([], {}, {}, "x: not closed"),
        ([outcome()], TRIAL, {}, "digits, adam, seed 3: hit at step 20, 200 ms; 50 steps in 500 ms of training"),
        ([outcome(status="miss", hit_step=None, hit_seconds=None)], {}, {}, "x: miss; 50 steps in 500 ms of training"),
    ],
)
def test_the_line(records: Any, trial: Any, status: Any, text: str) -> None:
    assert headline(Run(Path("runs/x"), None, records, 0, trial, status, {})) == text


def test_it_needs_no_matplotlib() -> None:
    code = "import sys, cockpit_bench.runlog.page; assert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_histogram_is_told_as_one() -> None:
    outputs = {"counts": {"kind": "histogram", "unit": "labels"}, "bare": {"kind": "per-layer", "unit": "1"}}
    header = Header("x", "now", extra={"instruments": {"mine/all": {"outputs": outputs}}})
    table = [[0.0, 1.0, 2.0], [4, 3, 0]]
    reading = Reading("mine/all", 5, 0.0, "ok", {"counts": table, "bare": [1.0, 2.0]})
    html = Run(Path("runs/x"), header, [reading], 0, {}, {}, {})._repr_html_()
    assert ">7 counted in 3 bins, upper limits 0 to 1, median 0<" in html
    assert ">labels<" in html
    assert ">2 values, 1 to 2<" in html
