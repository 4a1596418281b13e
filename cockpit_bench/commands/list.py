"""`cockpit-bench list`: names and one line each, read from files without importing them; prices are measured."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict

import workloads
from cockpit_bench import panels
from cockpit_bench.bench.names import ALGORITHMS
from cockpit_bench.runlog.codec import spell
from instruments import catalogue


def call(arguments: argparse.Namespace) -> None:
    """Print one kind of names, or all, or what a panel costs on a workload."""
    if arguments.prices is not None:
        _prices(arguments)
        return
    if arguments.panel is not None:
        raise ValueError("expected --panel together with --prices WORKLOAD, got it alone; names need no panel")
    _names(arguments)


def _names(arguments: argparse.Namespace) -> None:
    found: dict[str, Mapping[str, str]] = {
        "workloads": {name: workloads.summary_of(name) for name in workloads.names()},
        "instruments": {name: catalogue.summary(name) for name in catalogue.names()},
        "panels": {name: panels.describe(name) for name in panels.PANELS},
        "algorithms": ALGORITHMS,
    }
    chosen = [arguments.what] if arguments.what else list(found)
    if arguments.json:
        print(json.dumps({kind: found[kind] for kind in chosen}, indent=2))
        return
    for kind in chosen:
        print(f"{kind}:")
        width = max(map(len, found[kind]), default=0)
        for name, line in found[kind].items():
            print(f"  {name:{width}}  {line}".rstrip())


def _prices(arguments: argparse.Namespace) -> None:
    if arguments.what is not None:
        raise ValueError(f"expected names or prices, got both '{arguments.what}' and --prices; ask for one at a time")
    from cockpit_bench.bench.pricing import prices  # brings torch with it: prices are measured

    panel = arguments.panel or "standard"
    found = prices(arguments.prices, None if panel == "none" else panel)
    if arguments.json:
        print(json.dumps(spell({"panel": panel, **asdict(found), "share": found.share}), indent=2, allow_nan=False))
        return
    print(f"{arguments.prices}, panel {panel}: {found}")
