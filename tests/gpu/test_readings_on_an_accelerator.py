"""On an accelerator: readings are those of the CPU, and training is unchanged bit for bit. Skipped without one.

COCKPIT_TEST_DEVICE names another device; with "cpu" these tests test themselves.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from cockpit_bench import Cockpit
from cockpit_bench.panels import PANELS

DEVICE = os.environ.get("COCKPIT_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="expected a CUDA device, found none"
)
STEPS = 3  # the second and third are read from the watched pass


class Attending(nn.Module):
    """Embedding, causal attention, LayerNorm and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(6, 8) * 0.1)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(6, device=x.device, dtype=self.position.dtype)
        logits: Tensor = self.head(self.block(self.token(x) + self.position, src_mask=mask))
        return logits.transpose(1, 2)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip


def images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=generator)


def words(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(11, (16, 6), generator=generator) for _ in range(2))  # type: ignore[return-value]


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], tuple[Tensor, Tensor]]]] = {
    "convolutions": (convolutional, images),
    "attention": (Attending, words),
    "dropout": (lambda: Attending(0.2), words),
}


def train(problem: str, device: str, panel: Any) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """All records of readings by instrument and step, and the model at the end."""
    model_of, draw = PROBLEMS[problem]
    torch.manual_seed(0)
    model, generator = model_of().double(), torch.Generator().manual_seed(1)
    model.to(device)
    optimizer, loss_fn = optim.Adam(model.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    records: dict[Any, Any] = {}

    def keep(record: Any) -> None:
        if (name := getattr(record, "instrument", None)) is not None:
            records[name, record.step] = record

    how: dict[str, Any] = {"panel": panel, "budget": None, "sinks": [keep]}
    with Cockpit(model, optimizer, loss=loss_fn, **how) as cockpit:
        for _ in range(STEPS):
            x, y = (t.to(device) for t in draw(generator))
            loss = loss_fn(model(x), y)
            loss.backward()
            cockpit.observe((x, y), loss)
            optimizer.step()
            optimizer.zero_grad()
    return records, {name: t.detach().cpu() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("problem", ["convolutions", "attention"])
def test_readings_are_those_of_the_cpu(problem: str) -> None:
    """Every instrument of the full panel at every step, in float64."""
    panel = dict.fromkeys(PANELS["full"], 1)
    here, there = (train(problem, device, panel)[0] for device in ("cpu", DEVICE))
    assert here.keys() == there.keys()
    for key, record in here.items():
        assert there[key].status == record.status, f"{key}: {there[key].reason}"
        for name, value in (record.values or {}).items():
            assert there[key].values[name] == pytest.approx(value, rel=1e-4, abs=1e-9, nan_ok=True), f"{key} {name}"


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_observation_leaves_training_as_it_is(problem: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    _, plain = train(problem, DEVICE, None)
    _, observed = train(problem, DEVICE, dict.fromkeys(PANELS["full"], 1))
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(plain[name], observed[name]) for name in plain)
