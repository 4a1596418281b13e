"""A table of small models with awkward parts, each with a loss and a batch: what every instrument is checked on.

Everything is float64 and seeded, so that slow twins can be compared to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = 6


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.b(torch.tanh(self.a(x))))


class TiedAttention(nn.Module):
    """Embedding tied to the output, LayerNorm, causal attention: (N, T) tokens to (N, V, T) logits."""

    def __init__(self, vocabulary: int = 7, width: int = 4) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        q, k, v = self.qkv(self.norm(h)).unsqueeze(1).chunk(3, dim=-1)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.head(h).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0][:, -1])


class Twice(nn.Module):
    """One layer called twice, and a parameter that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Bare(nn.Module):
    """Parameters outside any layer, one used by broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.rand(4)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale) @ self.matrix


class Scalars(nn.Module):
    """Parameters without a dimension: a gate that is used twice, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 5), nn.Linear(5, 3)
        self.gate, self.bias = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(x) * self.gate + self.bias) * self.gate)


def frozen_mlp() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4), torch.randint(0, 3, (N,))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 2, 5, 5), torch.randint(0, 3, (N,))


def tokens() -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 7, (N, 6))
    targets = text[:, 1:].clone()
    targets[0, :2] = -100  # ignored positions
    return text[:, :-1], targets


def regression() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4), torch.randn(N, 3)


def binary() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4), torch.randint(0, 2, (N, 3)).double()


def weighted_cross_entropy() -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]))


def custom(call: Callable[..., Any], batch: Any) -> Tensor:
    """A loss that no module computes, on a dictionary."""
    return torch.log(torch.cosh(call(batch["x"]) - batch["y"])).sum(-1)


@dataclass(frozen=True)
class Case:
    """`examples`: whether gradients of single examples are defined. `random`: whether the forward draws numbers."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[], Any]
    examples: bool = True
    random: bool = False


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def in_place_relu() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(12, 3)
    )


def cnn_plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


CASES = [
    Case("mlp", mlp, rows, nn.CrossEntropyLoss),
    Case("mlp_sum", mlp, rows, lambda: nn.CrossEntropyLoss(reduction="sum")),
    Case("mlp_weighted", mlp, rows, weighted_cross_entropy),
    Case("mlp_smoothed", mlp, rows, lambda: nn.CrossEntropyLoss(label_smoothing=0.1)),
    Case("mlp_squared", mlp, regression, nn.MSELoss),
    Case("mlp_binary", mlp, binary, nn.BCEWithLogitsLoss),
    Case("mlp_custom", mlp, lambda: dict(zip("xy", regression(), strict=True)), lambda: custom),
    Case("in_place_relu", in_place_relu, rows, nn.CrossEntropyLoss),
    Case("cnn", cnn, images, nn.CrossEntropyLoss),
    Case("cnn_plain", cnn_plain, images, nn.CrossEntropyLoss),
    Case("batch_norm_train", batch_norm, rows, nn.CrossEntropyLoss, examples=False),
    Case("batch_norm_eval", lambda: batch_norm().eval(), rows, nn.CrossEntropyLoss),
    Case("dropout", dropout, rows, nn.CrossEntropyLoss, random=True),
    Case("layer_norm", layer_norm, rows, nn.CrossEntropyLoss),
    Case("residual", Residual, rows, nn.CrossEntropyLoss),
    Case("tied_attention", TiedAttention, tokens, nn.CrossEntropyLoss),
    Case("recurrent", Recurrent, lambda: (torch.randn(N, 5, 3), torch.randint(0, 3, (N,))), nn.CrossEntropyLoss),
    Case("called_twice_unused", Twice, rows, nn.CrossEntropyLoss),
    Case("bare_parameters", Bare, regression, nn.MSELoss),
    Case("scalars", Scalars, rows, nn.CrossEntropyLoss),
    Case("frozen", frozen_mlp, rows, nn.CrossEntropyLoss),
]
BY_NAME = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Built:
    """A case made: model, loss and batch, all float64."""

    model: nn.Module
    loss: Any
    batch: Any


def build(case: Case, seed: int = 0) -> Built:
    """The same numbers for the same seed, and no global default left changed."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        loss = case.loss()
        return Built(case.model().double(), loss.double() if isinstance(loss, nn.Module) else loss, case.batch())
    finally:
        torch.set_default_dtype(torch.float32)
