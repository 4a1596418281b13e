"""`cockpit-bench plot`: the panel picture of a run, or everything that one instrument read. Imports no torch."""

import argparse
import json
from pathlib import Path

from cockpit_bench.commands.show import latest
from cockpit_bench.runlog import Run, read_run

FORMATS = ("png", "pdf", "svg")


def call(arguments: argparse.Namespace) -> None:
    """Write the picture beside the log, or where --out says, and print where it is."""
    from cockpit_bench.plots import save

    run, label = read_run(latest(Path(arguments.run))), arguments.instrument
    if label is not None:
        known(run, label)
    name = f"{'panel' if label is None else label.replace('/', '_')}.{arguments.format}"
    path = Path(arguments.out) if arguments.out else run.folder / "figures" / name
    if path.suffix.lstrip(".") not in FORMATS:
        raise ValueError(f"expected --out to end in one of {', '.join(FORMATS)}, got '{path.name}'")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(run.plot(label), path)
    print(json.dumps({"figure": str(path)}) if arguments.json else path)


def known(run: Run, label: str) -> None:
    """Raises ValueError with the nearest labels for one that the run does not have."""
    try:
        run[label]
    except KeyError as error:
        raise ValueError(error.args[0]) from None
