"""`cockpit-bench plot`: the panel picture of a run. Imports no torch."""

import argparse
import json
from pathlib import Path

from cockpit_bench.commands.show import latest
from cockpit_bench.runlog import read_run

FORMATS = ("png", "pdf", "svg")


def call(arguments: argparse.Namespace) -> None:
    """Write the picture beside the log, or where --out says, and print where it is."""
    from cockpit_bench.plots.panel import panel, save

    run = read_run(latest(Path(arguments.run)))
    path = Path(arguments.out) if arguments.out else run.folder / "figures" / f"panel.{arguments.format}"
    if path.suffix.lstrip(".") not in FORMATS:
        raise ValueError(f"expected --out to end in one of {', '.join(FORMATS)}, got '{path.name}'")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(panel(run), path)
    print(json.dumps({"figure": str(path)}) if arguments.json else path)
