"""Models whose parameters are used in ways that no list of layers foresees, each with inputs for N examples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

N = 6


class VisionTransformer(nn.Module):
    """Patches by a convolution, an expanded class token, a broadcast position, attention with packed projections."""

    def __init__(self, tokens: int = 9, width: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, tokens + 1, width))
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1) + self.pos
        return self.head(self.encoder(h)[:, 0])


class SequenceFirst(nn.Module):
    """Positions lead, examples follow: the rows of a layer are not grouped by example."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens.t())).mean(0))


class Recommender(nn.Module):
    """A bag of items beside a user's row."""

    def __init__(self, mode: str = "mean") -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=2)
        self.users, self.out = nn.Embedding(5, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.items(x), self.users(x[:, 0] % 5)], 1))


class Einsum(nn.Module):
    """Attention weights written by hand; parameters broadcast with minus and division."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(4, 2, 3)), nn.Parameter(torch.randn(2, 3, 3))
        self.u = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("btd,dhk->bthk", x, self.w))
        return torch.einsum("bthk,hkc->btc", h, self.o).mean(1) * self.u - self.u / 2


class Heads(nn.Module):
    """One matrix a head, applied to all examples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.mean(1).expand(2, -1, -1), self.w).tanh().sum(0)


class LeftMatrix(nn.Module):
    """W @ X with the examples as columns."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w @ x.t()).tanh().t()


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.recurrent = kind(4, 3, batch_first=True, bidirectional=True, num_layers=2)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.recurrent(x)[0][:, -1])


class ResidualGroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.second, self.out = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        return self.out((h + self.second(h)).mean((2, 3)))


class Frames(nn.Module):
    """Three frames an example, folded into the batch of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 2, stride=2, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        h = self.conv(x.reshape(n * 3, 1, 2, 6))
        return self.out(h.mean((2, 3)).view(n, 3, 4).mean(1))


class CrossAttention(nn.Module):
    """Queries from elsewhere: the packed projection is split; a position table is sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.query, self.out, self.table = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(self.query(x), x + self.table[: x.shape[1]], x)[0].mean(1))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.out, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        inner = x.clone().requires_grad_()
        return self.out(checkpoint(lambda h: self.inner(h).tanh(), inner, use_reentrant=self.reentrant))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(_Product.apply(x, self.w).tanh())


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.PReLU(5), nn.Linear(5, 3))


def conv_and_back(dims: int) -> nn.Module:
    """Strided grouped convolution with circular padding, then a transposed one with output padding."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    back = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return nn.Sequential(
        conv(2, 4, 2, stride=2, padding=1, groups=2, padding_mode="circular"), nn.Tanh(),
        back(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(6 * 6**dims, 3),
    )  # fmt: skip


def vectors() -> Tensor:
    return torch.randn(N, 4)


def sequences() -> Tensor:
    return torch.randn(N, 3, 4)


def images() -> Tensor:
    return torch.randn(N, 1, 6, 6)


def tokens() -> Tensor:
    return torch.randint(0, 7, (N, 5))


@dataclass(frozen=True)
class Odd:
    """`engine`: who reads the model in float64 under "auto"."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    engine: str = "fused"


ZOO = (
    Odd("vision_transformer", VisionTransformer, images),
    Odd("sequence_first", SequenceFirst, tokens),
    Odd("bag_mean", Recommender, tokens),
    Odd("bag_sum", lambda: Recommender("sum"), tokens),
    Odd("bag_max", lambda: Recommender("max"), tokens, "fused; torch.func for 1 of 4 parameters"),
    Odd("einsum", Einsum, sequences, "fused; torch.func for 1 of 3 parameters"),
    Odd("heads", Heads, sequences),
    Odd("left_matrix", LeftMatrix, vectors),
    Odd("lstm", lambda: Recurrent(nn.LSTM), sequences),
    Odd("gru", lambda: Recurrent(nn.GRU), sequences),
    Odd("residual_group_norm", ResidualGroupNorm, images),
    Odd("frames", Frames, images),
    Odd("cross_attention", CrossAttention, sequences),
    Odd("weight_norm", weight_norm, vectors, "fused; torch.func for 3 of 6 parameters"),
    Odd("checkpoint", lambda: Checkpointed(reentrant=False), vectors, "loop"),
    Odd("custom_function", CustomFunction, vectors, "fused; loop for 1 of 3 parameters"),
    Odd("rms_norm", lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Linear(5, 3)), vectors),
    Odd("conv_1d", lambda: conv_and_back(1), lambda: torch.randn(N, 2, 4)),
    Odd("conv_2d", lambda: conv_and_back(2), lambda: torch.randn(N, 2, 4, 4)),
    Odd("conv_3d", lambda: conv_and_back(3), lambda: torch.randn(N, 2, 4, 4, 4)),
)
