"""Causal transformer that predicts the next byte of Python source: a small GPT with a tied embedding.

The text is the source of ten modules of the running interpreter, so it differs between Python versions; the target
is therefore relative to an n-gram model of the same text. Pre-norm decoder after GPT-2 (Radford et al., 2019), with
its initialisation: standard deviation 0.02, residual outputs scaled down by sqrt(2 layers).

Legend: N windows, T bytes per window, V = 256 byte values, D width, H heads, K = D / H.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.data.ngram import ngram_cross_entropy
from workloads.data.text import VOCABULARY, read_split, standard_library, windows
from workloads.evaluation import classification
from workloads.target import Target, at_most
from workloads.workload import Data, Workload, hashed

MODULES = (
    "argparse",
    "csv",
    "dataclasses",
    "difflib",
    "fractions",
    "heapq",
    "random",
    "shutil",
    "statistics",
    "textwrap",
)
CONTEXT = 64
NGRAM_ORDER = 3
FACTOR = 1.0


class Attention(nn.Module):
    """Causal self-attention: position t mixes the values of the positions up to t."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        split = self.query_key_value(x_NTD).unflatten(-1, (3, self.heads, -1))
        q_NHTK, k_NHTK, v_NHTK = split.permute(2, 0, 3, 1, 4)
        mixed_NHTK = F.scaled_dot_product_attention(
            q_NHTK, k_NHTK, v_NHTK, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        out_NTD: Tensor = self.output(mixed_NHTK.transpose(1, 2).flatten(2))
        return out_NTD


class Block(nn.Module):
    """Attention, then a perceptron of four times the width; each reads a normalised copy and adds to the stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD + self.dropout(self.attention(self.attention_norm(x_NTD)))
        out_NTD: Tensor = x_NTD + self.dropout(self.mlp(self.mlp_norm(x_NTD)))
        return out_NTD


class Decoder(nn.Module):
    """Logits of the next byte after each byte of a window.

    One matrix embeds the bytes and, transposed, scores them. The byte values stand in the second dimension of the
    answer, where `nn.CrossEntropyLoss` expects the classes. Windows may be shorter than `context`, not longer.
    """

    def __init__(
        self, *, width: int = 64, heads: int = 4, layers: int = 2, context: int = CONTEXT, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"expected heads to divide the width {width}, got {heads}; each head takes an equal share of it"
            )
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions_TD = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self._initialise(layers)

    def forward(self, inputs_NT: Tensor) -> Tensor:
        """logits_NVT."""
        length, context = inputs_NT.size(1), len(self.positions_TD)
        if length > context:
            raise ValueError(
                f"expected windows of at most {context} bytes, got {length}; cut them shorter or build the model "
                "with a longer context: later positions have no embedding"
            )
        x_NTD = self.embedding(inputs_NT) + self.positions_TD[:length]
        logits_NTV: Tensor = F.linear(self.norm(self.blocks(x_NTD)), self.embedding.weight)
        return logits_NTV.transpose(1, 2)

    def _initialise(self, layers: int) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions_TD, std=0.02)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                writes_to_stream = name.endswith(("attention.output", "mlp.2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if writes_to_stream else 0.02)
                nn.init.zeros_(module.bias)


def text_data(paths: Sequence[Path], *, context: int = CONTEXT, stride: int = CONTEXT // 2) -> Data:
    """Windows of these files as batches (inputs_NT, targets_NT), with `notes["ngram_cross_entropy"]` in nats per byte.

    Training windows begin every `stride` bytes and overlap, validation windows do not. The n-gram model sees up to
    NGRAM_ORDER bytes before each validation byte, across the borders of windows. With `dataclasses.replace(WORKLOAD,
    load=lambda: text_data(paths))` the workload runs on other text.
    """
    train_n, valid_n = read_split(paths)
    return hashed(
        windows(train_n, context=context, stride=stride),
        windows(valid_n, context=context, stride=context),
        {"ngram_cross_entropy": ngram_cross_entropy(train_n, valid_n, order=NGRAM_ORDER)},
    )


def target(data: Data) -> Target:
    """Loss in nats per byte, at most FACTOR times that of the n-gram model on the same text."""
    return at_most("valid_loss", FACTOR * data.notes["ngram_cross_entropy"])


WORKLOAD = Workload(
    name="byte_lm",
    summary="Causal transformer that predicts the next byte of Python source: a small GPT with a tied embedding.",
    load=lambda: text_data(standard_library(MODULES)),
    make_model=lambda data: Decoder(),
    loss=nn.CrossEntropyLoss(),
    evaluate=functools.partial(classification, chunk=128),
    target=target,
    batch_size=32,
    steps=2500,
    evaluate_every=50,
    # Adam and AdamW reach the target after about 1,650 steps; the others, at the best rates found, miss the budget.
    baselines={
        "sgd": {"lr": 0.3},
        "momentum": {"lr": 0.2, "momentum": 0.9},
        "nesterov": {"lr": 0.1, "momentum": 0.9},
        "adam": {"lr": 0.002},
        "adamw": {"lr": 0.002, "weight_decay": 0.01},
        "rmsprop": {"lr": 0.0005},
    },
)
