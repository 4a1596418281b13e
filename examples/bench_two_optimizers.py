"""Two optimizers on one workload over several seeds, and what became of it: python examples/bench_two_optimizers.py

Every trial is timed with the instruments on; their time is not on the clock. Runs stay in --runs DIR if it is given,
where a finished trial is not run again.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from cockpit_bench import Trial, read_run, run
from cockpit_bench.bench.comparison import compare
from cockpit_bench.plots.comparison import comparison
from cockpit_bench.plots.panel import save


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", default="digits_mlp")
    parser.add_argument("--algorithms", nargs=2, default=["adam", "momentum"], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", help="folder for the runs and the picture (default: none are kept)")
    parser.add_argument("--smoke", action="store_true", help="two seeds of 40 steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(arguments.runs or scratch)
        steps, seeds = (40, 2) if arguments.smoke else (None, arguments.seeds)
        folders = []
        for algorithm in arguments.algorithms:
            for seed in range(seeds):
                trial = Trial(arguments.workload, algorithm, seed=seed, steps=steps)
                result = run(trial, root, sinks=[])
                folders.append(result.folder)
                end = result.outcome
                hit = f"hit at {end.hit_seconds:.2f} s" if end.hit_seconds is not None else "no hit"
                print(f"{algorithm:10} seed {seed}  {hit}, {end.seconds:.2f} s of training in all")
        runs = [read_run(folder) for folder in folders]
        groups, ratios = compare(runs)
        for group in groups:
            hits = f"{group.hits} of {len(group.entries)} hit"
            print(f"{group.name:22} {hits}; median {group.steps:g} steps, {group.seconds:.3g} s")
        for ratio in ratios:
            (steps_ratio, *_), (seconds_ratio, low, high) = ratio.steps, ratio.seconds
            print(f"{ratio.name}: {steps_ratio:.2f} times the steps, {seconds_ratio:.2f} ({low:.2f} to {high:.2f}) "
                  f"times the seconds of {ratio.base}, {ratio.pairs} pairs")  # fmt: skip
        save(comparison(runs, groups), root / "comparison.png")
        if arguments.runs:
            print(root / "comparison.png")


if __name__ == "__main__":
    main()
