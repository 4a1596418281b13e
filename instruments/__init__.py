"""Instruments: what is measured on one step of training.

This package knows models, batches, optimizers and linear algebra; it knows no file, clock, log, schedule, workload or
command line. Importing it imports no torch: names are resolved when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instruments.guard import untouched as untouched
    from instruments.instrument import Estimate as Estimate
    from instruments.instrument import Gauge as Gauge
    from instruments.instrument import Instrument as Instrument
    from instruments.instrument import Output as Output
    from instruments.probe import Probe as Probe
    from instruments.probe_settings import ProbeSettings as ProbeSettings
    from instruments.refusal import Refusal as Refusal
    from instruments.view import View as View

HOME = {
    "Estimate": "instruments.instrument",
    "Gauge": "instruments.instrument",
    "Instrument": "instruments.instrument",
    "Output": "instruments.instrument",
    "Probe": "instruments.probe",
    "ProbeSettings": "instruments.probe_settings",
    "Refusal": "instruments.refusal",
    "View": "instruments.view",
    "untouched": "instruments.guard",
}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'instruments' has no attribute '{name}'")
    return getattr(import_module(HOME[name]), name)
