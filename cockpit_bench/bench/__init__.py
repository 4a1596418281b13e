"""Timed runs of workloads: trials, the runner, optimizers by name."""
