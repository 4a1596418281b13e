"""What a panel adds to training, by how often it reads curvature, beside what the price of a reading predicts.

    python tests/benchmarks/cadence_overhead.py [mlp cnn] [--cadences 10 30 100 300] [--repeats 12] [--json]

Two copies of one network are trained with Adam on batches of 128, one plain and one with the cockpit, no budget;
curvature is read on 512 held examples. Blocks of the two take turns, each the least multiple of the cadence from 100
steps on. `curvature` reads sharpness and rho and nothing else; `standard` is that panel for a run of 40 times the
cadence in steps, so that it reads curvature at the cadence and the gradient distribution five times as often; `light`
has no cadence of its own, and in `nothing` nothing is due. All write a run folder with its log and its TensorBoard
events, except `light, no log`, which keeps its records in memory.

`overhead` is the CPU seconds of all observed blocks over those of the plain ones, less one, all threads of the process
together, with its standard error; the quartiles are those of single pairs of blocks. Two predictions stand beside it,

    sum over readings (price of the reading in g) / (steps * g per step)

with g a gradient of the mean loss on the batch that is read, measured in the same run, and a plain step in these g.
`counted` takes the prices that the meters show, gradients plus products at 2 g each; `declared` those that instruments
declare beforehand for a usual reading, each alone: what two of them share is in it twice. Neither knows of a fixed time
a step or a reading, nor of the log. One thread for torch.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import PROBLEMS, Batch, Problem
from torch import nn

from cockpit_bench import Cockpit, batches, never
from cockpit_bench.tables import text_table
from instruments.operators.hessian import KEPT_PRODUCT

LOSS = nn.CrossEntropyLoss()
CURVATURE = ("curvature/sharpness", "curvature/preconditioned_sharpness")
LEAST_STEPS, READINGS_A_RUN = 100, 40
UNLOGGED = "light, no log"
Setup = tuple[str, int | None]  # panel and cadence


def seconds_of(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def observed_by(setup: Setup) -> dict[str, Any]:
    """What the cockpit of a setup is told."""
    name, cadence = setup
    if cadence is None:
        return {"panel": dict.fromkeys(CURVATURE, never) if name == "nothing" else "light"}
    if name == "standard":
        return {"panel": "standard", "steps": READINGS_A_RUN * cadence}
    return {"panel": dict.fromkeys(CURVATURE, cadence)}


class Training:
    """One copy of the network, with a cockpit or without."""

    def __init__(self, problem: Problem) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        draw = problem.data()
        self.model, self.probe = problem.model(), draw(problem.probe, generator)
        self.data = [draw(problem.batch, generator) for _ in range(LEAST_STEPS)]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.cockpit: Cockpit | None = None
        self.steps = 0

    def watch(self, **told: Any) -> Cockpit:
        self.cockpit = Cockpit(self.model, self.optimizer, loss=LOSS, budget=None, probe=batches(self.probe), **told)
        return self.cockpit

    def block(self, steps: int) -> None:
        for _ in range(steps):
            x, y = self.data[self.steps % len(self.data)]
            loss = LOSS(self.model(x), y)
            loss.backward()
            if self.cockpit is not None:
                self.cockpit.observe((x, y), loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1

    def gradient_seconds(self, batch: Batch) -> float:
        params, (x, y) = list(self.model.parameters()), batch
        return statistics.median(
            seconds_of(lambda: torch.autograd.grad(LOSS(self.model(x), y), params)) for _ in range(3)
        )


def measure(problem: Problem, setup: Setup, repeats: int) -> dict[str, Any]:
    steps = math.ceil(LEAST_STEPS / (setup[1] or 1)) * (setup[1] or 1)
    plain, observed = Training(problem), Training(problem)
    pairs: list[tuple[float, float]] = []
    units: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        written: dict[str, Any] = {"logdir": None, "sinks": ()} if setup[0] == UNLOGGED else {"logdir": f"{folder}/run"}
        cockpit = observed.watch(**written, **observed_by(setup))
        for index in range(repeats + 1):
            order = (plain, observed) if index % 2 else (observed, plain)
            seconds = {training: seconds_of(partial(training.block, steps)) for training in order}
            pairs.append((seconds[plain], seconds[observed]))
            units.append((plain.gradient_seconds(plain.data[0]), plain.gradient_seconds(plain.probe)))
        prices = cockpit.prices(observed.data[0])
        cockpit.close()
        log = Path(folder, "run", "log.jsonl")
        readings = taken(log, since=steps) if log.exists() else []  # the panel light has no price
    step_g, held_g = np.median(units, axis=0)
    g = {"step": float(step_g), "held": float(held_g)}
    step = sum(p for p, _ in pairs[1:]) / (repeats * steps)  # the first blocks open the log and read from no memory
    counted = sum(price(r) * g[r["provenance"]["batch"]] for r in readings)
    return {
        "panel": setup[0],
        "cadence": setup[1],
        "steps": repeats * steps,
        "step_ms": step * 1e3,
        "step_g": step / g["step"],
        "step_held_g": step / g["held"],
        **overhead(pairs[1:]),
        "counted": counted / (repeats * steps * step),
        "declared": sum(row.due * row.declared * g[batch_of(row.label)] for row in prices.rows) / step,
    }


def taken(log: Path, since: int) -> list[dict[str, Any]]:
    """The readings from that step on."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    found = [r for r in records if r["kind"] == "reading" and r["step"] >= since]
    assert all(r["status"] == "ok" for r in found), "no budget, and yet not every reading was taken"
    return found


def price(reading: Mapping[str, Any]) -> float:
    """In g, by its meter."""
    return float(reading["cost"]["gradients"] + KEPT_PRODUCT * reading["cost"]["products"])


def batch_of(label: str) -> str:
    return "held" if label.startswith("curvature/") else "step"


def overhead(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Ratio of the totals, less one, with the standard error of a ratio of means."""
    plain, observed = np.array(pairs).T
    ratio = observed.sum() / plain.sum()
    scatter = np.sqrt(len(pairs) * np.var(observed - ratio * plain, ddof=1))
    quartiles = np.quantile(observed / plain - 1, [0.25, 0.5, 0.75])
    return {
        "overhead": float(ratio - 1),
        "standard_error": float(scatter / plain.sum()),
        "quartiles": quartiles.tolist(),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [("panel", "cadence", "overhead", "+-", "quartiles of blocks", "counted", "declared", "steps")]
    for row in rows:
        low, _, high = row["quartiles"]
        cells.append(
            (
                row["panel"], str(row["cadence"] or "-"), f"{row['overhead']:.1%}", f"{row['standard_error']:.1%}",
                f"{low:.1%} to {high:.1%}", f"{row['counted']:.1%}", f"{row['declared']:.1%}", str(row["steps"]),
            )
        )  # fmt: skip
    return text_table(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("problems", nargs="*", default=["mlp", "cnn"], help=f"of {', '.join(PROBLEMS)}")
    parser.add_argument("--cadences", nargs="+", type=int, default=[10, 30, 100, 300], help="steps between readings")
    parser.add_argument("--repeats", type=int, default=12, help="pairs of blocks that count (default 12)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setups: list[Setup] = [("nothing", None), (UNLOGGED, None), ("light", None)]
    setups += [(panel, cadence) for panel in ("curvature", "standard") for cadence in arguments.cadences]
    results = {}
    for name in arguments.problems:
        results[name] = rows = [measure(PROBLEMS[name], setup, arguments.repeats) for setup in setups]
        if arguments.json:
            continue
        step = {key: statistics.median(row[key] for row in rows) for key in ("step_ms", "step_g", "step_held_g")}
        print(
            f"{name}, Adam, {arguments.repeats} pairs of blocks: a plain step takes {step['step_ms']:.2f} ms, "
            f"{step['step_g']:.2f} g of its own batch, {step['step_held_g']:.2f} g of the held one"
        )
        print("\n".join(table(rows)), flush=True)
    if arguments.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
