"""Runs side by side, against numbers worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cockpit_bench import cli, read_run
from cockpit_bench.bench.comparison import compare
from cockpit_bench.bench.trial import Trial
from cockpit_bench.runlog import LogWriter, Metrics, Outcome, Reading, new_header

TARGET = {"metric": "valid_accuracy", "value": 0.9, "direction": "at_least"}


def write(root: Path, algorithm: str, seed: int, hit: tuple[int, float] | None, lr: float = 0.1, **trial: Any) -> Path:
    folder = root / f"{algorithm}-{lr}-{seed}-{trial.get('workload', 'blobs')}"
    folder.mkdir(parents=True)
    described = Trial(
        **{"workload": "blobs", "algorithm": algorithm, "seed": seed, "hyperparameters": {"lr": lr}, **trial}
    )
    (folder / "trial.toml").write_text(described.to_toml())
    log = LogWriter(folder / "log.jsonl", new_header(folder.name, target=TARGET))
    log.write(Reading("curvature/preconditioned_sharpness", 0, 0.0, "ok", {"rho": 0.5}))
    log.write(Metrics(10, 0.1, {"valid_accuracy": 0.95 if hit else 0.5}, "evaluation"))
    step, seconds = hit or (None, None)
    log.write(Outcome("hit" if hit else "miss", 100, 2.0, step, seconds, 0.95, "", {}, 3.0, {"x": 1.0}))
    log.close()
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for seed, hit in enumerate([(20, 0.2), (40, 0.4), (30, 0.3)]):
        write(root, "adam", seed, hit)
    for seed, hit in enumerate([(40, 0.3), None, (90, 0.6)]):
        write(root, "sgd", seed, hit)
    return root


def test_groups_medians_and_paired_ratios(root: Path) -> None:
    groups, ratios = compare([read_run(folder) for folder in root.iterdir()])
    assert [(g.name, g.hits, g.steps, g.seconds) for g in groups] == [
        ("blobs adam", 3, 30, 0.3),
        ("blobs sgd", 2, 90, 0.6),
    ]
    (ratio,) = ratios
    assert (ratio.name, ratio.base, ratio.pairs) == ("blobs sgd", "blobs adam", 2)
    assert ratio.steps == (2.5, 2.0, 3.0)
    assert ratio.seconds == pytest.approx((1.75, 1.5, 2.0))


def test_a_miss_is_infinitely_long(root: Path) -> None:
    write(root, "rmsprop", 0, None)
    groups, ratios = compare([read_run(folder) for folder in root.iterdir()])
    assert math.isinf(groups[-1].steps)
    assert groups[-1].name == "blobs rmsprop"
    assert "blobs rmsprop" not in [ratio.name for ratio in ratios]


def test_groups_are_named_by_what_differs_and_compared_within_a_workload(tmp_path: Path) -> None:
    for lr in (0.1, 0.3):
        write(tmp_path, "sgd", 0, (10, 0.1), lr=lr)
    write(tmp_path, "sgd", 0, (5, 0.1), workload="other")
    groups, ratios = compare([read_run(folder) for folder in tmp_path.iterdir()])
    assert sorted(g.name for g in groups) == ["blobs sgd lr=0.1", "blobs sgd lr=0.3", "other sgd"]
    assert len(ratios) == 1


def test_the_command_prints_and_draws(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "compare.png"
    assert cli.main(["compare", str(root), "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "2 of 3" in said
    assert "blobs sgd took 2.5 times the steps (2 to 3) and 1.75 times the seconds" in said
    assert picture.stat().st_size > 5000
    assert cli.main(["compare", str(root), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["groups"][1]["entries"][1]["steps"] == "Infinity"


def test_what_cannot_be_read_is_left_out_of_a_folder_of_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dead-1", "dead-2"):
        (root / name).mkdir()
        (root / name / "log.jsonl").touch()
    assert cli.main(["compare", str(root)]) == 0
    said = capsys.readouterr()
    assert "blobs sgd took 2.5 times the steps" in said.out
    assert [line.split(", got")[0] for line in said.err.splitlines()] == [
        f"cockpit-bench: left out: expected records in {root / name / 'log.jsonl'}" for name in ("dead-1", "dead-2")
    ]
    assert cli.main(["compare", str(root), str(root / "dead-1")]) == 2
    assert "cockpit-bench: expected records in" in capsys.readouterr().err


def test_runs_that_have_not_ended_are_left_out_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    LogWriter(folder / "log.jsonl", new_header("one")).close()
    with pytest.raises(ValueError, match="have ended"):
        compare([read_run(folder)])
    assert cli.main(["compare", str(tmp_path)]) == 2
    assert "has ended" in capsys.readouterr().err
