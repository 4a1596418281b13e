"""The benchmark of reproductions, shortened: it finds what it should, and it can miss."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "reproductions"
sys.path.insert(0, str(FOLDER))

import adam  # noqa: E402
import descent  # noqa: E402
import minibatches  # noqa: E402
import warmup  # noqa: E402
from claim import Check, near  # noqa: E402

from cockpit_bench import at  # noqa: E402


def verdicts(checks: list[Check]) -> list[str]:
    return [check.verdict for check in checks]


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproductions", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("values", "of", "verdict"),
    [
        ([0.95, 1.05], "each", "reproduced"),
        ([0.5, 1.5], "each", "missed"),
        ([0.5, 1.5], "mean", "reproduced"),
        ([0.5, 0.6, 1.0], "median", "missed"),
        ([1.0, float("nan")], "each", "missed"),
        ([1.0, float("nan")], "mean", "missed"),
        ([], "each", "missed"),
    ],
)
def test_a_verdict_is_about_the_numbers(values: list[float], of: str, verdict: str) -> None:
    assert Check("x", "", values, **near(1.0, 0.1), of=of).verdict == verdict  # type: ignore[arg-type]


def test_r01_edges_are_exact_and_a_wrong_gain_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(descent.thresholds([0], steps=400)) == ["reproduced"] * 8
    nesterov_as_heavy_ball = ("Nesterov 0.9", 3.8, descent.HEAVY | {"nesterov": True})
    monkeypatch.setattr(descent, "EDGES", (nesterov_as_heavy_ball,))
    assert verdicts(descent.thresholds([0], steps=400)) == ["missed", "reproduced"]


def test_r01_another_optimizer_does_not_read_one_at_this_edge() -> None:
    assert descent.rho_on_parabola(38.0, descent.HEAVY) == pytest.approx(10)


def test_r03_the_control_stays_below_where_r02_does_not() -> None:
    assert verdicts(descent.control([0], steps=1200)) == ["reproduced", "reproduced"]
    steps, rho, _ = descent.descend(0, 0.2, 0.6, 300)
    assert 100 <= descent.hit_of(steps, rho) < 300


def test_r06_the_first_step_is_far_beyond_the_edge_and_linear_in_the_rate() -> None:
    (low,), (high,) = (adam.adam(1, lr, True, 1, at(0), 1e-3) for lr in (1e-3, 1e-2))
    assert float(low) == pytest.approx(2.6, rel=0.3)
    assert float(high / low) == pytest.approx(10, rel=0.01)


def test_r07_a_smaller_batch_ends_flatter() -> None:
    large, small = (minibatches.plateau(minibatches.stochastic(0, 0.1, size, 600)) for size in (50, 16))
    assert small + 0.05 < large < 0.9


def test_r10_warm_up_is_what_makes_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(warmup.with_and_without([0])) == ["reproduced", "reproduced"]
    monkeypatch.setattr(warmup, "WARMUP", 1)
    assert verdicts(warmup.with_and_without([0])) == ["reproduced", "missed"]


def test_r11_tanh_trains_beyond_the_bound_but_not_far_beyond() -> None:
    assert [warmup.trained(0, "tanh", times) for times in (5, 8)] == [1.0, 0.0]


def test_the_command_prints_verdicts_and_refuses_unknown_claims(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(descent, "edge", lambda settings, steps: 2.0)  # true for gradient descent alone
    assert command.main(["--only", "R01", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["verdict"] == "missed (6 of 8)"
    assert [check["verdict"] for check in record["checks"]][:2] == ["reproduced", "reproduced"]
    assert command.main(["--only", "R01"]) == 0
    assert "missed      stable up to eta lambda  [heavy ball 0.9]" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--only", "R99"])
