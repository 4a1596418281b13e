"""cockpit_bench: an instrument panel for training neural networks in PyTorch.

Everything a user needs is here, by its name; the work is done in the packages `cockpit_bench`, `instruments` and
`workloads`. Importing this imports no torch: names are resolved when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cockpit_bench.shadowing import warn_of_shadows

if TYPE_CHECKING:
    from cockpit_bench.bench.runner import run as run
    from cockpit_bench.bench.trial import Trial as Trial
    from cockpit_bench.cadence import at as at
    from cockpit_bench.cadence import every as every
    from cockpit_bench.cadence import never as never
    from cockpit_bench.cadence import spread as spread
    from cockpit_bench.cockpit import Cockpit as Cockpit
    from cockpit_bench.cockpit import batches as batches
    from cockpit_bench.runlog import Event as Event
    from cockpit_bench.runlog import Metrics as Metrics
    from cockpit_bench.runlog import Outcome as Outcome
    from cockpit_bench.runlog import Reading as Reading
    from cockpit_bench.runlog import read_run as read_run
    from instruments import Estimate as Estimate
    from instruments import Gauge as Gauge
    from instruments import Instrument as Instrument
    from instruments import Output as Output
    from instruments import ProbeSettings as ProbeSettings
    from instruments import Refusal as Refusal
    from workloads import Workload as Workload
    from workloads import at_least as at_least
    from workloads import at_most as at_most

HOME = {
    "Cockpit": "cockpit_bench.cockpit",
    "batches": "cockpit_bench.cockpit",
    "Trial": "cockpit_bench.bench.trial",
    "run": "cockpit_bench.bench.runner",
    "at": "cockpit_bench.cadence",
    "every": "cockpit_bench.cadence",
    "never": "cockpit_bench.cadence",
    "spread": "cockpit_bench.cadence",
    "Event": "cockpit_bench.runlog",
    "Metrics": "cockpit_bench.runlog",
    "Outcome": "cockpit_bench.runlog",
    "Reading": "cockpit_bench.runlog",
    "read_run": "cockpit_bench.runlog",
    "Estimate": "instruments",
    "Gauge": "instruments",
    "Instrument": "instruments",
    "Output": "instruments",
    "ProbeSettings": "instruments",
    "Refusal": "instruments",
    "Workload": "workloads",
    "at_least": "workloads",
    "at_most": "workloads",
}


warn_of_shadows()


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'cockpit_bench' has no attribute '{name}'")
    return getattr(import_module(HOME[name]), name)
