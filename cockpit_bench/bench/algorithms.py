"""Optimizers by name, as a trial file, the command line and a workload's baselines use them."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, optim

from cockpit_bench.bench.names import ALGORITHMS
from instruments.catalogue import nearest

Make = Callable[..., optim.Optimizer]
ALIASES: Mapping[str, tuple[Make, Mapping[str, Any]]] = {
    "momentum": (optim.SGD, {"momentum": 0.9}),
    "nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


def names() -> list[str]:
    """Every name that `make` understands."""
    return sorted(ALGORITHMS)


def settings(name: str, baseline: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a trial: the alias's own, then the workload's baseline, then what the trial says.

    Raises ValueError for an unknown algorithm or hyperparameter, with the nearest names.
    """
    make, fixed = _resolve(name)
    known = [p for p in inspect.signature(make).parameters if p != "params"]
    merged = {**fixed, **baseline, **overrides}
    for key in merged:
        if key not in known:
            raise ValueError(f"expected a hyperparameter of {name}, got '{key}'; {nearest(key, known)}.")
    return merged


def make(name: str, params: Iterable[Tensor], hyperparameters: Mapping[str, Any]) -> optim.Optimizer:
    """The optimizer. Raises ValueError with torch's own words for a value that it refuses."""
    optimizer, _ = _resolve(name)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in hyperparameters.items()}
    try:
        return optimizer(params, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} refuses its hyperparameters {values}: {error}") from error


def _resolve(name: str) -> tuple[Make, Mapping[str, Any]]:
    if name not in ALGORITHMS:
        raise ValueError(f"expected the name of an algorithm, got '{name}'; {nearest(name, ALGORITHMS)}.")
    if name in ALIASES:
        return ALIASES[name]
    classes = {cls.lower(): cls for cls in vars(optim)}
    if name not in classes:
        raise ValueError(f"this version of torch ({torch.__version__}) has no optimizer '{name}'; upgrade torch.")
    return getattr(optim, classes[name]), {}
