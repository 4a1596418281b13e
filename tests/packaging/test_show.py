"""`cockpit-bench show` on values of every kind: short enough to read, and true."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cockpit_bench import cli
from cockpit_bench.runlog import LogWriter, Reading, new_header

KINDS = {"whole": "scalar", "groups": "per-group", "layers": "per-layer", "counts": "histogram", "joint": "grid"}
VALUES: dict[str, Any] = {
    "whole": 1.23456,
    "groups": [0.1, 0.2],
    "layers": np.arange(50.0),
    "counts": [[0.0, 1.0, math.inf], [0, 5, 2]],
    "joint": np.ones((26, 26)),
    "ragged": [[1.0], []],
}
FACTS = {"examples": 64, "mode": "train", "modules": ["conv", "head"], "error": 0.123456, "nothing": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    outputs = {name: {"kind": kind, "unit": "1"} for name, kind in KINDS.items()}
    writer = LogWriter(tmp_path / "log.jsonl", new_header("one", instruments={"mine/all": {"outputs": outputs}}))
    writer.write(Reading("mine/all", 0, 0.0, "ok", VALUES, {"whole": 0.25}, provenance=FACTS))
    writer.write(Reading("mine/all", 5, 0.0, "skipped", reason="over the budget"))
    writer.write(Reading("mine/bare", 7, 0.0, "ok", {"counts": [[0.0, 1.0], [2, 3]]}))
    writer.write(Reading("mine/none", 7, 0.0, "failed", reason="no gradient"))
    writer.close()
    return tmp_path


def test_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "reading   mine/all   [1 ok, 1 skipped] step 0: whole 1.235 ± 0.25, groups [0.1 0.2]",
        "            layers: 50 values, min 0, median 24.5, max 49",
        "            counts: 7 counted in 3 bins, upper limits 1 to inf, median 1",
        "            joint: 625 counted in 25 x 25 bins",
        "            ragged: values of different lengths",
        "            (examples 64, mode train, modules 2, error 0.1235)",
        "reading   mine/bare  [1 ok] step 7",
        "            counts: array of 2 x 2",
        "reading   mine/none  [1 failed] no gradient",
    ]


def test_json_has_every_number_and_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["instruments"]["mine/all"]
    assert facts["values"]["layers"] == list(range(50))
    assert facts["values"]["counts"][0] == [0.0, 1.0, "Infinity"]
    assert facts["provenance"]["modules"] == ["conv", "head"]
