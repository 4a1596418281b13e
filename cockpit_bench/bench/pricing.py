"""What a panel costs on a workload, measured on one batch of its training data before anything is trained."""

import torch

from cockpit_bench.bench import algorithms
from cockpit_bench.bench.runner import plan, probe_batches
from cockpit_bench.bench.trial import Trial
from cockpit_bench.cockpit import Cockpit, off
from cockpit_bench.prices import Prices


def prices(workload: str, panel: str | None = "standard") -> Prices:
    """The price list of a panel on a workload, for the workload's own steps, batch size and probe batches.

    The optimizer is that of `Trial`: it decides nothing but what the preconditioner is read from. ValueError for an
    unknown workload or panel, with the nearest names.
    """
    if off():
        raise ValueError("expected to measure prices, got COCKPIT=off in the environment; unset it")
    planned = plan(Trial(workload, panel=panel))
    problem, trial = planned.workload, planned.trial
    torch.manual_seed(trial.seed)
    data = problem.load()
    model = problem.make_model(data)
    batch = next(problem.batches(data, generator=torch.Generator().manual_seed(trial.seed)))
    optimizer = algorithms.make(
        trial.algorithm, [p for p in model.parameters() if p.requires_grad], trial.hyperparameters
    )
    cockpit = Cockpit(
        model, optimizer, loss=problem.loss, panel=trial.panel, budget=None, steps=trial.steps,
        probe=probe_batches(problem, data), sinks=[],
    )  # fmt: skip
    with cockpit:
        return cockpit.prices(batch)
