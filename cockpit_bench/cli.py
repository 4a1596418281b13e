"""The command line: parses and calls. Exit codes: 0 done (a missed target is a result), 1 the run failed, 2 misuse."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

DONE, FAILED, MISUSE = 0, 1, 2
LISTS = ("workloads", "instruments", "panels", "algorithms")

DESCRIPTION = """\
An instrument panel for training neural networks in PyTorch, and a benchmark whose misses are explained.

  list     what there is: workloads, instruments, panels, algorithms
  run      train a workload under the clock with a panel of instruments
  show     what a run folder says
  plot     the panel picture of a run, or what one instrument read
  compare  steps and seconds to target of several runs
  dash     TensorBoard on this machine, at the cockpit's charts
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="cockpit-bench",
        description=DESCRIPTION,
        epilog="example: cockpit-bench run digits_2c2d --algorithm adam --panel standard",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"cockpit-bench {metadata.version('cockpit-bench')}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _list(sub)
    _run(sub)
    _show(sub)
    _plot(sub)
    _compare(sub)
    _dash(sub)
    return top


def _list(sub: Any) -> None:
    p = sub.add_parser(
        "list",
        help="what there is: workloads, instruments, panels, algorithms",
        description="List names; that imports no torch and runs nothing. --prices measures what a panel costs.",
        epilog="example: cockpit-bench list --prices digits_2c2d --panel full",
    )
    p.add_argument(
        "what",
        nargs="?",
        choices=("workloads", "instruments", "panels", "algorithms"),
        help="one kind only (default: all)",
    )
    p.add_argument("--prices", metavar="WORKLOAD", help="measure a reading of each instrument on one training batch")
    p.add_argument("--panel", metavar="NAME", help="with --prices: light, standard, full or none (default: standard)")
    p.add_argument("--json", action="store_true", help="machine-readable output on stdout")


def _run(sub: Any) -> None:
    p = sub.add_parser(
        "run",
        help="train a workload under the clock with a panel of instruments",
        description="Run one trial. A finished run of the same trial is shown instead, unless --again.",
        epilog="example: cockpit-bench run digits_2c2d --algorithm adam --set lr=3e-3 --seed 1",
    )
    p.add_argument("workload", help="name of a workload, or a trial file ending in .toml")
    p.add_argument("--algorithm", metavar="NAME", help="optimizer (default: adam)")
    p.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a hyperparameter, over the baseline's"
    )
    p.add_argument("--seed", type=int, metavar="N", help="seed of model and data order (default: 0)")
    p.add_argument("--panel", metavar="NAME", help="light, standard, full or none (default: standard)")
    p.add_argument("--steps", type=int, metavar="N", help="budget in optimizer steps (default: the workload's)")
    p.add_argument("--batch-size", type=int, metavar="N", help="examples a step (default: the workload's)")
    p.add_argument("--stop-at-target", action="store_true", default=None, help="end at the first hit")
    p.add_argument("--timeout-seconds", type=float, metavar="S", help="end after so much training time")
    p.add_argument("--threads", type=int, metavar="N", help="torch threads (default: torch's own)")
    p.add_argument("--runs", default="runs", metavar="DIR", help="where run folders are made (default: runs)")
    p.add_argument("--again", action="store_true", help="run even if this trial was finished before")
    p.add_argument("--json", action="store_true", help="the outcome as JSON on stdout")


def _show(sub: Any) -> None:
    p = sub.add_parser(
        "show",
        help="what a run folder says",
        description="Outcome, clock, tax and the last reading of every instrument of a run.",
        epilog="example: cockpit-bench show runs/20261120T120000.000000Z-digits_2c2d-adam-0123456789",
    )
    p.add_argument("run", help="a run folder, or a folder of runs (its latest is shown)")
    p.add_argument("--json", action="store_true", help="machine-readable output on stdout")


def _plot(sub: Any) -> None:
    p = sub.add_parser(
        "plot",
        help="the panel picture of a run, or what one instrument read",
        description="Metric, loss, step, gradient, curvature and clock of a run in one picture of 1600 x 1000 pixels. "
        "With --instrument every output of that instrument, also of one that the panel does not show.",
        epilog="example: cockpit-bench plot runs --instrument gradient/noise_scale --format pdf",
    )
    p.add_argument("run", help="a run folder, or a folder of runs (its latest is drawn)")
    p.add_argument("--instrument", metavar="LABEL", help="draw everything that this instrument read")
    p.add_argument(
        "--out", metavar="FILE", help="where to write it (default: figures/panel.png of the run, or figures/LABEL.png)"
    )
    p.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="without --out (default: png)")
    p.add_argument("--json", action="store_true", help="the path as JSON on stdout")


def _compare(sub: Any) -> None:
    p = sub.add_parser(
        "compare",
        help="steps and seconds to target of several runs",
        description="Runs that differ in the seed alone are one group; ratios are paired by seed, on both clocks.",
        epilog="example: cockpit-bench compare runs --out compare.png",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of runs")
    p.add_argument("--out", metavar="FILE", help="also draw it (png, pdf or svg by the ending)")
    p.add_argument("--json", action="store_true", help="machine-readable output on stdout")


def _dash(sub: Any) -> None:
    p = sub.add_parser(
        "dash",
        help="TensorBoard on this machine, at the cockpit's charts",
        description="Start TensorBoard on the loopback address and print the link. Ctrl-C stops it.",
        epilog="example: cockpit-bench dash runs --port 0",
    )
    p.add_argument("logdir", nargs="?", default="runs", help="a run folder or a folder of runs (default: runs)")
    p.add_argument("--port", type=int, default=6006, metavar="N", help="0 takes any that is free (default: 6006)")
    p.add_argument("--json", action="store_true", help="the link as JSON on stdout")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command `cockpit-bench`."""
    arguments = parser().parse_args(argv)
    try:
        failed = importlib.import_module(f"cockpit_bench.commands.{arguments.command}").call(arguments)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        print(f"cockpit-bench: {error}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        return MISUSE
    except KeyboardInterrupt:
        print("cockpit-bench: interrupted; the log of the run is intact.", file=sys.stderr)
        return FAILED
    return FAILED if failed else DONE
