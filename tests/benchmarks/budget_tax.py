"""What a budget of 5 % comes to: the measured tax of the panel `standard` round the loops of two workloads.

    python tests/benchmarks/budget_tax.py [digits_2c2d byte_lm] [--steps 600] [--budget 0.05] [--repeats 3] [--json]

A loop as a user writes it, with the workload's data, model, Adam baseline, target and evaluations, and a cockpit that
writes its run folder. `tax` is everything in the observe bucket, also what is billed to no instrument, over the
training seconds; beside it stand what was billed to instruments, the first readings, which the budget gives away, and
the training seconds after which the tax was at most 6 % for good. One thread; every clock reads the CPU time of the
process, so that other programs do not count. The default length is the workload's own.
"""

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

time.perf_counter = time.process_time  # before the cockpit's clocks are made from it

import torch  # noqa: E402

import workloads  # noqa: E402
from cockpit_bench import Cockpit, Reading  # noqa: E402
from cockpit_bench.bench import algorithms  # noqa: E402
from instruments.objective import as_objective  # noqa: E402

LIMIT = 0.06
Moments = list[tuple[float, float]]


def train(name: str, steps: int | None, budget: float, folder: str) -> tuple[Cockpit, Any, Moments]:
    """The cockpit of one run, its outcome, and (training seconds, observe seconds) after every step."""
    torch.manual_seed(0)
    workload = workloads.get(name)
    data, steps = workload.load(), steps or workload.steps
    model, objective = workload.make_model(data), as_objective(workload.loss)
    settings = algorithms.settings("adam", workload.baselines["adam"], {})
    optimizer = algorithms.make("adam", list(model.parameters()), settings)
    cockpit = Cockpit(
        model, optimizer, loss=workload.loss, logdir=folder, budget=budget, steps=steps, target=workload.target(data)
    )
    moments: Moments = []
    source = workload.batches(data, generator=torch.Generator().manual_seed(0))
    for step, batch in enumerate(cockpit.batches(source), start=1):
        loss = objective.parts(model, batch).loss
        loss.backward()
        cockpit.observe(batch, loss)
        optimizer.step()
        optimizer.zero_grad()
        moments.append((cockpit.clock.training, cockpit.clock.seconds["observe"]))
        if step % workload.evaluate_every == 0:
            with cockpit.evaluating() as log:
                log(**workload.evaluate(model, data.valid))
        if step == steps:
            break
    return cockpit, cockpit.close(), moments


def measure(name: str, steps: int | None, budget: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cockpit, outcome, moments = train(name, steps, budget, f"{folder}/run")
    readings = [r for r in cockpit.records if isinstance(r, Reading) and r.status != "skipped"]
    first: dict[str, float] = {}
    for reading in readings:
        first.setdefault(reading.instrument, reading.cost["seconds"])
    over = [seconds for seconds, observed in moments if observed > LIMIT * seconds]
    counts = {key: sum(r.instrument == key for r in readings) for key in outcome.tax}
    return {
        "steps": outcome.step,
        "training_seconds": outcome.seconds,
        "tax": outcome.buckets["observe"] / outcome.seconds,
        "billed": sum(outcome.tax.values()) / outcome.seconds,
        "first_readings_seconds": sum(first.values()),
        "seconds_until_6_percent": over[-1] if over else 0.0,
        "log_tax": outcome.buckets["log"] / outcome.seconds,
        "not_read_at_step_0": sorted(set(counts) - {r.instrument for r in readings if r.step == 0}),
        "readings": counts,
        "skips": dict(outcome.skips),
        "billed_seconds": dict(outcome.tax),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=["digits_2c2d", "byte_lm"])
    parser.add_argument("--steps", type=int, help="length of the run (default: the workload's own)")
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        n: [measure(n, arguments.steps, arguments.budget) for _ in range(arguments.repeats)]
        for n in arguments.workloads
    }
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, runs in results.items():
        median = {key: statistics.median(r[key] for r in runs) for key in runs[0] if isinstance(runs[0][key], float)}
        each = ", ".join(f"{run['tax']:.2%}" for run in runs)
        print(
            f"{name}: {runs[0]['steps']} steps, {median['training_seconds']:.1f} s of training, "
            f"medians of {len(runs)} runs, budget {arguments.budget:.0%}\n"
            f"  tax {median['tax']:.2%} (of the runs: {each}), billed to "
            f"instruments {median['billed']:.2%}; the log {median['log_tax']:.2%}\n"
            f"  first readings {median['first_readings_seconds'] * 1e3:.0f} ms; at most {LIMIT:.0%} from "
            f"{median['seconds_until_6_percent']:.1f} s of training on"
        )
        for key, count in runs[0]["readings"].items():
            late = "" if key not in runs[0]["not_read_at_step_0"] else "  NOT READ AT STEP 0"
            skipped = runs[0]["skips"].get(key, 0)
            share = runs[0]["billed_seconds"][key] / runs[0]["training_seconds"]
            print(f"  {key:36} {count:5} readings, {skipped:5} skipped, {share:.2%}{late}")


if __name__ == "__main__":
    main()
