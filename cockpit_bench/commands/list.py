"""`cockpit-bench list`: names and one line each, read from files without importing them."""

import argparse
import json
from collections.abc import Mapping

import workloads
from cockpit_bench import panels
from cockpit_bench.bench.names import ALGORITHMS
from instruments import catalogue


def call(arguments: argparse.Namespace) -> None:
    """Print one kind of names, or all."""
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
