"""Small training problems, awkward ones included, and one way to run them with or without a cockpit.

Shapes: N = examples of a batch.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from cockpit_bench.testing.training import Training as Training

N, FEATURES, CLASSES = 12, 6, 3
CROSS_ENTROPY = nn.CrossEntropyLoss()


class Reshaped(nn.Module):
    """Rows as small pictures."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.shape)


class PartlyUsed(nn.Module):
    """One layer is frozen, and one is never called: the optimizer holds it, but has no state for it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.unused = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES), nn.Linear(5, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(torch.tanh(self.frozen(x)))
        return out


class Attention(nn.Module):
    """Predicts the next token: layer norm, fused attention, dropout, and an output layer that is the embedding."""

    def __init__(self, vocabulary: int = 7, width: int = 4) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, vocabulary, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        x = x + self.scale * F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        logits: Tensor = self.out(x)
        return logits.transpose(1, 2)


class Noisy(nn.Module):
    """Adds to its input what a source of random numbers draws, on every forward in training mode."""

    def __init__(self, owned: Any, draw: Callable[[Any], float]) -> None:
        super().__init__()
        self.owned, self.draw = owned, draw
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x + self.draw(self.owned) if self.training else x)
        return out


def mlp(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), *extra, nn.Linear(8, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(Reshaped(1, 2, 3), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES))


def half_in_eval_mode() -> nn.Module:
    model = mlp(nn.Dropout(0.5), nn.BatchNorm1d(8))
    model[3].eval()
    return model


def sgd(model: nn.Module) -> list[optim.Optimizer]:
    return [optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]


def adam(model: nn.Module) -> list[optim.Optimizer]:
    return [optim.Adam(model.parameters(), lr=0.01)]


def two_groups(model: nn.Module) -> list[optim.Optimizer]:
    weights, biases = ([p for p in model.parameters() if (p.ndim > 1) is big] for big in (True, False))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.05, "betas": (0.8, 0.99)}]
    return [optim.AdamW(groups, lr=0.01)]


def two_optimizers(model: nn.Module) -> list[optim.Optimizer]:
    first, *rest = model.parameters()
    return [optim.SGD([first], lr=0.1, nesterov=True, momentum=0.5), optim.RMSprop(rest, lr=0.01, centered=True)]


def rows(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x_NF = torch.randn(N, FEATURES, generator=g)
    return x_NF, (x_NF[:, :CLASSES] + torch.randn(N, CLASSES, generator=g)).argmax(1)


def tokens(step: int) -> tuple[Tensor, Tensor]:
    text_NT = torch.randint(0, 7, (N, 6), generator=torch.Generator().manual_seed(step))
    return text_NT[:, :-1], text_NT[:, 1:]


@dataclass(frozen=True)
class Case:
    """A case as `cockpit_bench.testing` has them, with other defaults: rows, cross entropy, SGD."""

    name: str
    model: Callable[[], nn.Module]
    optimizers: Callable[[nn.Module], Sequence[Any]] = sgd
    loss: Any = CROSS_ENTROPY
    batch: Callable[[int], Any] = rows
    accumulate: int = 1
    clip: float | None = None


def smooth(call: Callable[..., Tensor], batch: Any) -> Tensor:
    """Cross entropy with a penalty on the slope of the outputs by the inputs, itself a derivative."""
    x_NF = batch[0].clone().requires_grad_()
    z_NC = call(x_NF)
    (slope_NF,) = torch.autograd.grad(z_NC.square().sum(), x_NF, create_graph=True)
    return F.cross_entropy(z_NC, batch[1], reduction="none") + slope_NF.square().sum(1)


def _torch_noise() -> nn.Module:
    return Noisy(torch.Generator().manual_seed(3), lambda g: torch.randn((), generator=g).item())


def _global_noise(_: Any) -> float:
    return float(np.random.uniform(-3, 3)) + random.random() + torch.rand(()).item()


CASES = (
    Case("mlp", mlp),
    Case("cnn", cnn, adam),
    Case("partly used", PartlyUsed, adam),
    Case("batch norm", lambda: mlp(nn.BatchNorm1d(8))),
    Case("spectral norm", lambda: mlp(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))), adam),
    Case("dropout", lambda: mlp(nn.Dropout(0.3)), adam),
    Case("half in eval mode", half_in_eval_mode, adam),
    Case("input gradients", lambda: mlp(nn.Dropout(0.3)), adam, smooth),
    Case("attention", Attention, adam, batch=tokens),
    Case("double precision", lambda: mlp().double(), batch=lambda step: (rows(step)[0].double(), rows(step)[1])),
    Case("two groups", mlp, two_groups),
    Case("two optimizers", mlp, two_optimizers),
    Case("accumulation", lambda: mlp(nn.Dropout(0.3)), two_groups, accumulate=3),
    Case("torch generator", _torch_noise),
    Case("numpy generator", lambda: Noisy(np.random.default_rng(3), lambda g: float(g.standard_normal())), adam),
    Case("numpy state", lambda: Noisy(np.random.RandomState(3), lambda g: float(g.standard_normal())), adam),
    Case("python generator", lambda: Noisy(random.Random(3), lambda g: g.gauss(0, 1)), adam),
    Case("global generators", lambda: Noisy(None, _global_noise)),
)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
