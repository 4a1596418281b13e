"""Hundreds of readings in a row: training does not notice them, and nothing piles up.

`python tests/benchmarks/many_readings.py` does the same a thousand times, and weighs the process too.
"""

import gc
from collections import Counter
from typing import Any

import torch
from loop_cases import Case, Training, adam, mlp, rows
from torch import Tensor, nn
from watching import readings, watch

from cockpit_bench import batches
from cockpit_bench.testing.traces import differences, state_of

READINGS, WARM = 200, 20
NAMES = ("curvature/sharpness", "gradient/norm")


def case() -> Case:
    return Case("dropout and batch norm", lambda: mlp(nn.BatchNorm1d(8), nn.Dropout(0.3)), adam)


def living() -> Counter[Any]:
    """Tensors by shape, those of no element apart."""
    gc.collect()
    return Counter(tuple(t.shape) for t in gc.get_objects() if issubclass(type(t), Tensor) and t.numel() > 1)


def test_many_readings_leave_memory_flat_and_training_as_it_is() -> None:
    plain = Training(case()).run(READINGS)
    training = Training(case())
    cockpit = watch(training, panel=None, instruments=dict.fromkeys(NAMES, 1), probe=batches(rows(99)))
    counts = []
    for step in range(READINGS):
        cockpit.observe(*training.backward(step))
        training.take_step()
        if step in (WARM, READINGS - 1):
            counts.append(living())
    cockpit.close()
    for name in NAMES:
        assert len(readings(cockpit, name, "ok")) == READINGS
    assert training.losses == plain.losses
    ends = [state_of(t.model, t.optimizers) for t in (plain, training)]
    assert differences(*ends) == []
    assert counts[1] == counts[0]


def test_the_count_sees_a_graph_that_is_kept() -> None:
    training, kept = Training(case()), []
    before = living()
    for step in range(3):
        training.backward(step)
        kept.append(
            torch.autograd.grad(training.loss(rows(step)), list(training.model.parameters()), create_graph=True)
        )
    assert (living() - before).total() >= 3 * 6
