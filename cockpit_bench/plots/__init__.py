"""Pictures of a run: one function per kind of plot, and figures composed of them. A view of the log, nothing more."""

from cockpit_bench.plots.instrument import instrument_figure
from cockpit_bench.plots.panel import save

__all__ = ["instrument_figure", "save"]
