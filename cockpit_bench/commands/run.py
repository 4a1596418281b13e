"""`cockpit-bench run`: one trial under the clock."""

import argparse
import json
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cockpit_bench.bench.trial import Trial
from cockpit_bench.commands.show import print_run
from cockpit_bench.runlog import read_run


def call(arguments: argparse.Namespace) -> bool:
    """Run a trial; True when the run itself failed (a missed target has not)."""
    trial = _trial(arguments)
    import torch

    from cockpit_bench.bench import runner

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"expected --threads >= 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    prepared = runner.prepare(trial, arguments.runs, again=arguments.again)
    try:
        result = prepared if isinstance(prepared, runner.Result) else prepared.go()
    except Exception:  # of the training code, and in the log by now
        traceback.print_exc()
        return True
    if not arguments.json and not result.fresh:
        print("this trial was finished before; --again runs it once more.")
    print_run(read_run(result.folder), arguments.json)
    return result.outcome.status in ("error", "out_of_memory")


def _trial(arguments: argparse.Namespace) -> Trial:
    given = {
        name: getattr(arguments, name)
        for name in ("algorithm", "seed", "panel", "steps", "batch_size", "stop_at_target", "timeout_seconds")
        if getattr(arguments, name) is not None
    }
    overrides = dict(_setting(text) for text in arguments.set)
    if arguments.workload.endswith(".toml"):
        trial = Trial.from_toml(Path(arguments.workload))
        base = asdict(trial)
    else:
        base = {"workload": arguments.workload}
    hyperparameters = {**base.pop("hyperparameters", {}), **overrides}
    if given.get("panel") == "none":
        given["panel"] = None
    return Trial(**{**base, **given, "hyperparameters": hyperparameters})


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"expected --set NAME=VALUE, got '{text}'; for example --set lr=3e-3")
    try:
        return name, json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        pass
    try:
        return name, float(value)
    except ValueError:
        return name, value
