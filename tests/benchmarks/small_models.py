"""Four networks of two to three thousand parameters, small enough for a tightly converged reference at every reading.

MLP, CNN with maximum pooling and ResNet with BatchNorm on scikit-learn digits, a causal transformer on source text; the
data and the step-by-step training are those of `models`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from models import Batch, Moment, Transformer, digits, source_text
from torch import Tensor, nn, optim

CLIP = 5.0


class Residual(nn.Module):
    """Two convolutions with BatchNorm round an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def transformer() -> nn.Module:
    return Transformer(vocabulary=96, width=8, layers=1, context=32)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), Residual(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Small:
    """`probe` and `batch` in examples."""

    model: Callable[[], nn.Module]
    data: Callable[[], Callable[[int, torch.Generator], Batch]]
    probe: int
    batch: int


SMALL = {
    "mlp": Small(mlp, digits, 128, 64),
    "cnn": Small(cnn, digits, 64, 32),
    "transformer": Small(transformer, source_text, 8, 8),
    "resnet": Small(resnet, digits, 64, 32),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], optim.Optimizer]] = {
    "sgd": lambda model: optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "adam": lambda model: optim.Adam(model.parameters(), lr=2e-3),
}


def trained(
    name: str, optimizer: str, *, scale: float = 1.0, seed: int = 0, readings: int, every: int
) -> Iterator[Moment]:
    """Train from an initialisation times `scale` and stop by before every `every`-th step; gradients are clipped."""
    small = SMALL[name]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, draw, loss_fn = small.model(), small.data(), nn.CrossEntropyLoss()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    steps = OPTIMIZERS[optimizer](model)
    probe = draw(small.probe, generator)
    for step in range((readings - 1) * every + 1):
        x, y = draw(small.batch, generator)
        steps.zero_grad()
        loss_fn(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if step % every == 0:
            yield Moment(step, model, steps, (x, y), probe)
        steps.step()
