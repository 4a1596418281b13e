"""The covering set: about twenty tiny training problems that between them use what models are made of.

Shapes: N = examples of a batch, F = features, T = tokens of an example.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from cockpit_bench.testing.training import Case, sgd

N, FEATURES, CLASSES, VOCABULARY, TOKENS = 12, 6, 3, 7, 5


class Residual(nn.Module):
    """Layer norm before a branch, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(FEATURES, 6), nn.LayerNorm(6)
        self.branch, self.out = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x_NF: Tensor) -> Tensor:
        h = self.first(x_NF)
        out: Tensor = self.out(h + F.gelu(self.branch(self.norm(h))))
        return out


class ResidualPictures(nn.Module):
    """Convolutions with group norm and a way past them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 2, padding=1), nn.GroupNorm(2, 2)
        self.branch, self.out = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, CLASSES)

    def forward(self, x_NF: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x_NF.reshape(len(x_NF), 1, 2, 3))))
        out: Tensor = self.out((h + self.branch(h)).mean((2, 3)))
        return out


class TiedAttention(nn.Module):
    """Predicts the next token: causal attention, and an output layer that is the embedding."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, VOCABULARY, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens_NT: Tensor) -> Tensor:
        x = self.embedding(tokens_NT)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        logits: Tensor = self.out(x)
        return logits.transpose(1, 2)


class Encoder(nn.Module):
    """torch's own attention layer over rows of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 2, 3, dropout=0.0, batch_first=True)
        self.first, self.out = nn.Linear(2, 2), nn.Linear(2, CLASSES)

    def forward(self, x_NF: Tensor) -> Tensor:
        out: Tensor = self.out(self.layer(self.first(x_NF.reshape(len(x_NF), 3, 2))).mean(1))
        return out


class Words(nn.Module):
    """An embedding, averaged and classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(VOCABULARY, 4), nn.Linear(4, CLASSES)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.embedding(tokens_NT).mean(1)))
        return out


class Recurrent(nn.Module):
    """A GRU over pairs, its last state classified."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(2, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x_NF: Tensor) -> Tensor:
        out: Tensor = self.out(self.gru(x_NF.reshape(len(x_NF), 3, 2))[0][:, -1])
        return out


class PartlyUsed(nn.Module):
    """One layer is frozen, and one is never called: the optimizer holds it, but has no state for it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.unused = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES), nn.Linear(5, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x_NF: Tensor) -> Tensor:
        out: Tensor = self.used(torch.tanh(self.frozen(x_NF)))
        return out


def mlp(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), *extra, nn.Linear(8, CLASSES))


def rectified(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), *extra, nn.ReLU(), nn.Linear(8, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


def optimizer(kind: Callable[..., Any], **settings: Any) -> Callable[[nn.Module], Sequence[Any]]:
    """One optimizer of that kind over all parameters."""
    return lambda model: [kind(model.parameters(), **settings)]


adam = optimizer(optim.Adam, lr=0.01)


def two_groups(model: nn.Module) -> Sequence[Any]:
    weights, biases = ([p for p in model.parameters() if (p.ndim > 1) is big] for big in (True, False))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.05, "betas": (0.8, 0.99)}]
    return [optim.AdamW(groups, lr=0.01)]


def two_optimizers(model: nn.Module) -> Sequence[Any]:
    first, *rest = model.parameters()
    return [optim.SGD([first], lr=0.1, nesterov=True, momentum=0.5), optim.RMSprop(rest, lr=0.01, centered=True)]


def rows(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and a class that they tell, with noise."""
    g = torch.Generator().manual_seed(step)
    x_NF = torch.randn(N, FEATURES, generator=g)
    return x_NF, (x_NF[:, :CLASSES] + torch.randn(N, CLASSES, generator=g)).argmax(1)


def numbers(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and numbers to predict."""
    x_NF, _ = rows(step)
    return x_NF, x_NF[:, :CLASSES] ** 2 - 1


def flags(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and yes-or-no answers, three an example."""
    x_NF, y = numbers(step)
    return x_NF, (y > 0).to(x_NF)


def fields(step: int) -> dict[str, Tensor]:
    """Inputs and numbers by name."""
    return dict(zip(("inputs", "numbers"), numbers(step), strict=True))


def next_tokens(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and what follows each of them; two of those do not count."""
    text_NT = torch.randint(0, VOCABULARY, (N, TOKENS + 1), generator=torch.Generator().manual_seed(step))
    targets_NT = text_NT[:, 1:].clone()
    targets_NT[0, :2] = -100
    return text_NT[:, :-1], targets_NT


def words(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and a class an example."""
    text_NT = torch.randint(0, VOCABULARY, (N, TOKENS), generator=torch.Generator().manual_seed(step))
    return text_NT, text_NT[:, 0] % CLASSES


def doubles(step: int) -> tuple[Tensor, Tensor]:
    x_NF, y_N = rows(step)
    return x_NF.double(), y_N


def log_cosh(call: Callable[..., Tensor], batch: Any) -> Tensor:
    """A loss that no module computes, by example, on a dictionary."""
    return torch.log(torch.cosh(call(batch["inputs"]) - batch["numbers"])).sum(-1)


def one_number(call: Callable[..., Tensor], batch: Any) -> Tensor:
    """A loss that does not tell examples apart."""
    return F.cross_entropy(call(batch[0]), batch[1])


COVERING_CASES: tuple[Case, ...] = (
    Case("mlp", mlp, rows, optimizer(optim.SGD, lr=0.1)),
    Case("momentum, clipped", mlp, rows, sgd, clip=0.1),
    Case("convolution", cnn, rows, adam),
    Case("batch norm", lambda: rectified(nn.BatchNorm1d(8)), rows, sgd),
    Case("batch norm in eval mode", lambda: rectified(nn.BatchNorm1d(8)).eval(), rows, adam),
    Case("dropout", lambda: rectified(nn.Dropout(0.3)), rows, optimizer(optim.AdamW, lr=0.01, amsgrad=True)),
    Case("layer norm", Residual, rows, optimizer(optim.RMSprop, lr=0.01)),
    Case("group norm", ResidualPictures, rows, optimizer(optim.SGD, lr=0.1, momentum=0.5, nesterov=True)),
    Case("tied attention", TiedAttention, next_tokens, adam),
    Case("encoder layer", Encoder, rows, optimizer(optim.AdamW, lr=0.01)),
    Case("embedding", Words, words, sgd),
    Case("recurrent", Recurrent, rows, optimizer(optim.RMSprop, lr=0.01, centered=True)),
    Case("frozen and unused", PartlyUsed, rows, adam),
    Case("two groups", mlp, rows, two_groups),
    Case("two optimizers", mlp, rows, two_optimizers),
    Case("squared error", mlp, numbers, optimizer(optim.SGD, lr=0.05), nn.MSELoss()),
    Case("binary", mlp, flags, adam, nn.BCEWithLogitsLoss()),
    Case("custom loss", rectified, fields, adam, log_cosh),
    Case("one number", mlp, rows, sgd, one_number),
    Case("accumulation", lambda: mlp(nn.Dropout(0.3)), rows, sgd, accumulate=2),
    Case("double precision", lambda: mlp().double(), doubles, sgd),
)
"""What `check_instrument` trains unless it is told otherwise."""
