"""What a panel adds to training, by how often it reads curvature, beside what the price of a reading predicts.

    python tests/benchmarks/cadence_overhead.py [mlp cnn] [--cadences 10 30 100 300] [--repeats 12] [--json]

Two copies of one network are trained with Adam on batches of 128, one plain and one with the cockpit, its log and its
TensorBoard events, no budget; curvature is read on 512 held examples. Blocks of the two take turns, each the least
multiple of the cadence from 100 steps on. `curvature` reads sharpness and rho and nothing else; `standard` is that
panel for a run of 40 times the cadence in steps, so that it reads curvature at the cadence and the gradient
distribution five times as often; `light` has no cadence of its own, and `nothing` is a cockpit in which nothing is due.

`overhead` is the CPU seconds of all observed blocks over those of the plain ones, less one, with its standard error;
the quartiles are those of single pairs of blocks. Two predictions stand beside it, both

    sum over readings (price of the reading in g) / (steps * g per step)

with g a gradient of the mean loss on the batch that is read, measured in the same run, and a plain step in these g.
`counted` takes the prices that the readings' meters show, gradients plus products at 2 g each; `declared` those that
the instruments declare beforehand for a usual reading. Neither knows of a fixed time a step or a reading, which
`nothing` and `light` show, nor of the log. One thread.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from models import PROBLEMS, Batch, Problem
from torch import nn

from cockpit_bench import Cockpit, Reading, batches, never
from cockpit_bench.tables import text_table
from instruments.operators.hessian import KEPT_PRODUCT

LOSS = nn.CrossEntropyLoss()
CURVATURE = ("curvature/sharpness", "curvature/preconditioned_sharpness")
LEAST_STEPS, READINGS_A_RUN = 100, 40
Setup = tuple[str, int | None]  # panel and cadence


def seconds_of(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def observed_by(setup: Setup) -> dict[str, Any]:
    """What the cockpit of a setup is told."""
    name, cadence = setup
    if cadence is None:
        return {"panel": "light" if name == "light" else dict.fromkeys(CURVATURE, never)}
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

    def watch(self, folder: str, **told: Any) -> Cockpit:
        self.cockpit = Cockpit(
            self.model, self.optimizer, loss=LOSS, logdir=folder, budget=None, probe=batches(self.probe), **told
        )
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
