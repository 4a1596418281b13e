"""Curvature summed over two processes against one process that holds the batches of both."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_cases import Case, Training, mlp
from user_together import SIZES, SUMMED, batch_of

from cockpit_bench import Cockpit, batches

PROGRAM = Path(__file__).with_name("user_together.py")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes read, in the order of their ranks."""
    store = tmp_path_factory.mktemp("together") / "store"
    processes = [
        subprocess.Popen([sys.executable, str(PROGRAM), str(rank), str(store)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    return [json.loads(process.communicate(timeout=120)[0]) for process in processes]


@pytest.fixture(scope="module")
def alone(said: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same readings by one process, at the weights that the two have reached, with both batches as one."""
    training = Training(Case("alone", mlp))
    with torch.no_grad():
        for p, values in zip(training.model.parameters(), said[0]["weights"], strict=True):
            p.copy_(torch.tensor(values))
    parts = [batch_of(3, rank) for rank in (0, 1)]
    whole = tuple(torch.cat(pair) for pair in zip(*parts, strict=True))
    cockpit = Cockpit(training.model, training.optimizers, loss=torch.nn.CrossEntropyLoss(), panel=None, sinks=[],
                      probe=batches(whole))  # fmt: skip
    training.case.loss(training.model(whole[0]), whole[1]).backward()
    cockpit.observe(whole)
    found = {name: dict(cockpit.read(instrument, whole).values) for name, instrument in SUMMED.items()}
    found["held"] = dict(cockpit.read("curvature/sharpness").values)
    for rank in (0, 1):
        found[f"alone {rank}"] = dict(cockpit.read(SUMMED["hessian"], parts[rank]).values)
        found[f"noise {rank}"] = dict(cockpit.read("gradient/noise_scale", parts[rank]).values)
    cockpit.close()
    return found


@pytest.mark.parametrize(
    ("label", "outputs"),
    [
        ("sharpness", ["sharpness"]),
        ("held", ["sharpness"]),
        ("rho", ["rho"]),
        ("hessian", ["largest", "smallest", "trace", "frobenius"]),
        ("gauss_newton", ["largest", "trace", "frobenius"]),
    ],
)
def test_the_sum_over_processes_is_the_reading_of_all_their_batches(
    said: list[dict[str, Any]], alone: dict[str, dict[str, Any]], label: str, outputs: list[str]
) -> None:
    """Batches of 12 and 5 weigh by their examples; both processes log the same."""
    assert said[0][label] == said[1][label]
    assert said[0][label]["status"] == "ok"
    assert said[0][label]["scope"] == "sum over 2 processes"
    assert said[0][label]["examples"] == sum(SIZES)
    assert said[0][label]["route"].endswith("summed over 2 processes")
    for output in outputs:
        assert said[0][label][output] == pytest.approx(alone[label][output], rel=1e-4 if label != "held" else 0.02), (
            output
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_group_a_reading_is_of_the_batch_of_its_own_process(
    said: list[dict[str, Any]], alone: dict[str, dict[str, Any]], rank: int
) -> None:
    """Curvature and single examples of a model inside DistributedDataParallel."""
    here = said[rank]
    assert (here["alone"]["scope"], here["alone"]["examples"]) == ("this one of 2 processes", SIZES[rank])
    assert here["alone"]["largest"] == pytest.approx(alone[f"alone {rank}"]["largest"], rel=1e-4)
    assert here["alone"]["largest"] != pytest.approx(alone["hessian"]["largest"], rel=0.01)
    for output in ("sum_of_squared_norms", "trace_of_covariance"):
        assert here["noise"][output] == pytest.approx(alone[f"noise {rank}"][output], rel=1e-4)


def test_nobody_is_left_waiting(said: list[dict[str, Any]]) -> None:
    """Whatever goes wrong on one process is a failed reading on all of them, and the next one is right again."""
    for here in said:
        assert "expected an instrument of the hessian or the gauss_newton" in here["noise together"]["reason"]
        assert "instrument Sharpness" in here["different"]["reason"]
        assert "Smallest" in here["different"]["reason"]
        assert here["broken"]["status"] == "failed"
        assert "1 of 2 processes could not compute its share" in here["broken"]["reason"]
        assert here["broken first"]["status"] == "failed"
        assert "KeyError: 'planted'" in here["broken first"]["reason"]
        assert here["mended"]["sharpness"] == here["by name"]["sharpness"]
    assert "KeyError: 'planted'" in said[1]["broken"]["reason"]
    assert "some that did not come" in said[0]["missing"]["reason"]
    assert (said[0]["logged"], said[1]["logged"]) == (7, 5)
