"""Runs one trial under the clock: eight buckets, evaluation at fixed steps, every ending an outcome."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import workloads
from cockpit_bench.bench import algorithms
from cockpit_bench.bench.trial import Trial
from cockpit_bench.cockpit import Cockpit, off
from cockpit_bench.runlog import Outcome, read_run
from cockpit_bench.runlog.reading import Ending as Status
from instruments.held import EXAMPLES
from instruments.objective import as_objective
from workloads.workload import Data, Workload

PROBE_BATCHES = 4  # size of the probe batch, in training batches
PROBE_SEED = 2**31 - 1  # of the probe batches: the same for every trial of a workload
FINISHED = ("hit", "miss", "diverged", "out_of_memory", "timeout", "done")


@dataclass(frozen=True)
class Result:
    """`fresh` is False when the outcome is that of an earlier, finished run of the same trial."""

    outcome: Outcome
    folder: Path
    fresh: bool


@dataclass(frozen=True)
class Plan:
    """A trial with everything looked up and checked, and nothing left to a default that may change."""

    trial: Trial
    workload: Workload


def plan(trial: Trial) -> Plan:
    """Resolve a trial: names are looked up, and baseline, steps and batch size written into it.

    Raises ValueError for what does not exist, with the nearest names.
    """
    workload = workloads.get(trial.workload)
    baseline = workload.baselines.get(trial.algorithm, {})
    hyperparameters = algorithms.settings(trial.algorithm, baseline, trial.hyperparameters)
    workload = replace(workload, batch_size=trial.batch_size or workload.batch_size)
    steps = trial.steps or workload.steps
    resolved = replace(trial, hyperparameters=hyperparameters, steps=steps, batch_size=workload.batch_size)
    return Plan(resolved, workload)


def run(trial: Trial, root: str | Path = "runs", *, again: bool = False, sinks: Sequence[Any] | None = None) -> Result:
    """Run a trial in a folder of its own under `root`, named by the time and the trial's hash.

    A finished run of the same trial is returned instead, unless `again`. Whatever ends the training is an outcome with
    its log intact; only a mistake in the trial itself raises (ValueError), and an error of the training code is raised
    after it was logged. KeyboardInterrupt is the outcome "interrupted", and is raised again.
    """
    prepared = prepare(trial, root, again=again, sinks=sinks)
    return prepared if isinstance(prepared, Result) else prepared.go()


def prepare(
    trial: Trial, root: str | Path = "runs", *, again: bool = False, sinks: Sequence[Any] | None = None
) -> "Result | TrialRun":
    """Everything that can be a mistake in the trial: what comes back trains, or is the result of an earlier run."""
    if off():
        raise ValueError("expected a trial to be measured, got COCKPIT=off in the environment; unset it to run trials")
    planned = plan(trial)
    trial = planned.trial
    earlier = None if again else find(trial, root)
    if earlier is not None:
        outcome = read_run(earlier).outcome
        assert outcome is not None
        return Result(outcome, earlier, fresh=False)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = Path(root) / f"{stamp}-{trial.workload}-{trial.algorithm}-{trial.hash}"
    torch.manual_seed(trial.seed)
    data = planned.workload.load()
    return TrialRun(planned, data, planned.workload.make_model(data), folder, sinks)


def find(trial: Trial, root: str | Path) -> Path | None:
    """The latest finished run of this resolved trial under `root`."""
    for folder in sorted(Path(root).glob(f"*-{trial.hash}"), reverse=True):
        try:
            outcome = read_run(folder).outcome
        except (OSError, ValueError):
            continue
        if outcome is not None and outcome.status in FINISHED:
            return folder
    return None


class TrialRun:
    """One trial, ready to train."""

    def __init__(self, planned: Plan, data: Data, model: nn.Module, folder: Path, sinks: Sequence[Any] | None) -> None:
        self.plan, self.data, self.model, self.folder = planned, data, model, folder
        workload, trial = planned.workload, planned.trial
        self.objective = as_objective(workload.loss)
        params = [p for p in model.parameters() if p.requires_grad]
        if not params:
            raise ValueError(f"expected a model with trainable parameters, got none in '{workload.name}'.")
        self.optimizer = algorithms.make(trial.algorithm, params, trial.hyperparameters)
        self.target = workload.target(data)
        self.batches = workload.batches(data, generator=torch.Generator().manual_seed(trial.seed))
        self.cockpit = Cockpit(
            model, self.optimizer, loss=workload.loss, logdir=folder, panel=trial.panel, budget=None,
            target=self.target, steps=trial.steps, probe=probe_batches(workload, data), sinks=sinks,
        )  # fmt: skip
        self.cockpit.write_text("trial.toml", trial.to_toml())
        self.cockpit.event("trial", **{name: value for name, value in asdict(trial).items() if value is not None})
        self.cockpit.event("data", sha256=data.sha256, target=str(self.target), **data.notes)

    def go(self) -> Result:
        """Train to the end, whatever the end is; an error of the training code is raised after it was logged."""
        with self.cockpit as cockpit:
            ending = self._train()
            with cockpit.clock.bucket("checkpoint"):
                cockpit.save_checkpoint("last.pt", model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
            outcome = cockpit.close(*ending)
        assert outcome is not None
        return Result(outcome, self.folder, fresh=True)

    def _train(self) -> tuple[Status | None, str]:
        """Train to the end of the budget. Returns (status, reason); None lets target and loss decide."""
        cockpit, clock, workload = self.cockpit, self.cockpit.clock, self.plan.workload
        clock.start()
        self._evaluate()
        for step, batch in enumerate(cockpit.batches(self.batches), start=1):
            with clock.bucket("forward"):
                loss = self.objective.parts(self.model, batch).loss
            with clock.bucket("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            cockpit.observe(batch, loss)
            with clock.bucket("update"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not math.isfinite(value := loss.item()):
                return "diverged", f"the training loss is {value} at step {step - 1}"
            if step % workload.evaluate_every == 0 or step == self.plan.trial.steps:
                self._evaluate()
                if cockpit.target_hit and self.plan.trial.stop_at_target:
                    break
            limit = self.plan.trial.timeout_seconds
            if limit is not None and clock.training > limit:
                return "timeout" if not cockpit.target_hit else None, f"more than {limit:g} s of training"
            if step == self.plan.trial.steps:
                break
        return None, ""

    def _evaluate(self) -> None:
        with self.cockpit.evaluating() as log:
            log(**self.plan.workload.evaluate(self.model, self.data.valid))


def probe_batches(workload: Workload, data: Data) -> list[tuple[Tensor, ...]]:
    """Two batches of training examples, together four training batches and at most 512, the same for every seed."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    examples = min(PROBE_BATCHES * workload.batch_size, EXAMPLES, len(data.train[0]))
    source = replace(workload, batch_size=max(1, examples // 2))
    return list(islice(source.batches(data, generator=generator), 2))
