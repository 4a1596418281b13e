"""Small networks, their data and a training run: where readings are compared.

MLP 64-256-256-10, a CNN and a ResNet with BatchNorm on scikit-learn digits, a two-layer causal transformer on the
source of the standard library; the probe batch is fixed along the run.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Draw = Callable[[int, torch.Generator], Batch]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside an identity, or a convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.beside: nn.Module = nn.Identity()
        if stride > 1:
            self.beside = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.beside(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Residual(16, 16, 1),
        Residual(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 96, width: int = 64, layers: int = 2, context: int = 32) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position
        for block in self.blocks:
            h = block(h, src_mask=self.mask)
        return self.head(self.norm(h)).transpose(1, 2)


def digits() -> Draw:
    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(y)

    def draw(n: int, generator: torch.Generator) -> Batch:
        rows = torch.randint(len(images), (n,), generator=generator)
        return images[rows], labels[rows]

    return draw


def source_text() -> Draw:
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    text = "".join(file.read_text(encoding="utf8", errors="ignore") for file in files)
    codes = torch.tensor([min(max(ord(c) - 32, 0), 95) for c in text if ord(c) < 128])

    def draw(n: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(codes) - 40, (n,), generator=generator)
        windows = torch.stack([codes[i : i + 33] for i in starts])
        return windows[:, :-1], windows[:, 1:]

    return draw


@dataclass(frozen=True)
class Problem:
    """`probe` and `batch` in examples, `sgd` is a learning rate."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Draw]
    probe: int
    batch: int
    sgd: float


PROBLEMS = {
    "mlp": Problem("mlp", mlp, digits, 512, 128, 0.1),
    "cnn": Problem("cnn", cnn, digits, 512, 128, 0.05),
    "transformer": Problem("transformer", Transformer, source_text, 32, 16, 0.1),
}
RESNET = Problem("resnet", resnet, digits, 512, 128, 0.05)


@dataclass(frozen=True)
class Moment:
    """The run at one reading: gradients stand in `.grad`, the optimizer has not stepped yet."""

    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch
    probe: Batch


def trajectory(
    problem: Problem, *, seed: int, readings: int, every: int, optimizer_name: str = "adam"
) -> Iterator[Moment]:
    """Train with Adam at its default rate, or with plain SGD, and stop by before every `every`-th step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, draw, loss_fn = problem.model(), problem.data(), nn.CrossEntropyLoss()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=problem.sgd)
    if optimizer_name == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    probe = draw(problem.probe, generator)
    for step in range((readings - 1) * every + 1):
        x, y = draw(problem.batch, generator)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        if step % every == 0:
            yield Moment(step, model, optimizer, (x, y), probe)
        optimizer.step()
