"""Pictures of a run: one function per kind of plot, and figures composed of them. A view of the log, nothing more."""
