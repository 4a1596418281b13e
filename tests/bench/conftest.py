"""A tiny workload to run: two blobs, a linear model, hit in a few steps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workloads
from workloads import Workload, at_least
from workloads.workload import hashed


def load() -> Any:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 2
    x = torch.randn(64, 3, generator=g) + 6 * y[:, None] - 3
    return hashed((x, y), (x[:16], y[:16]))


def evaluate(model: nn.Module, valid: tuple[Tensor, ...]) -> dict[str, float]:
    with torch.no_grad():
        return {"valid_accuracy": float((model(valid[0]).argmax(1) == valid[1]).float().mean())}


BLOBS = Workload(
    name="blobs",
    summary="Two blobs.",
    load=load,
    make_model=lambda data: nn.Linear(3, 2),
    loss=nn.CrossEntropyLoss(),
    evaluate=evaluate,
    target=lambda data: at_least("valid_accuracy", 0.9),
    batch_size=16,
    steps=12,
    evaluate_every=4,
    baselines={"adam": {"lr": 0.3}, "sgd": {"lr": 0.5}},
)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workload]:
    """Makes `blobs` a known workload, with some of its fields exchanged."""

    def plant(**changes: Any) -> Workload:
        workload = replace(BLOBS, **changes)
        real = workloads.get
        monkeypatch.setattr(workloads, "get", lambda name: workload if name == "blobs" else real(name))
        return workload

    return plant
