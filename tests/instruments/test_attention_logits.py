"""Attention logits and entropies against attention written out, however the model spells it."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, build
from torch import Tensor, nn
from zoo import CrossAttention, SequenceFirst, VisionTransformer

from instruments import Probe, Refusal, View
from instruments.network.attention_logits import AttentionLogits
from instruments.objective import as_objective

N, T, D, H = 3, 5, 4, 2


def read(model: nn.Module, batches: list[Any], loss: Any = None) -> tuple[dict[str, Any], list[str]]:
    instrument = AttentionLogits()
    with Probe(model, as_objective(loss or nn.MSELoss()), [], batches) as probe:
        view = View(probe, instrument.needs)
        values = instrument.read(view)
    return dict(values), view.meter.provenance["modules"]


class Attention(nn.Module):
    """One projection, then attention in one of many spellings: (N, T, D) to (N, T, D)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv = how, nn.Linear(D, 3 * D)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).view(N, -1, 3, H, D // H).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        z = q @ k.transpose(-1, -2) / math.sqrt(D // H)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        match self.how:
            case "sdpa":
                h = F.scaled_dot_product_attention(q, k, v)
            case "sdpa causal":
                h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "sdpa mask":
                h = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
            case "sdpa dropout":
                h = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
            case "product":
                h = z.softmax(-1) @ v
            case "einsum causal":
                a = z.masked_fill(~causal, -math.inf).softmax(-1)
                h = torch.einsum("nhqk,nhkd->nhqd", F.dropout(a, 0.2), v)
            case "finite mask":
                h = (z + torch.where(causal, 0.0, -1e4)).softmax(dim=3) @ v
            case "cast":
                h = z.double().softmax(-1).to(v) @ v
        return h.transpose(1, 2).reshape(x.shape)


SPELLINGS = (
    "sdpa", "sdpa causal", "sdpa mask", "sdpa dropout", "product", "einsum causal", "finite mask", "cast"
)  # fmt: skip


def by_hand(model: Attention, x: Tensor) -> dict[str, float]:
    """One query after the other."""
    causal = model.how in ("sdpa causal", "sdpa mask", "einsum causal", "finite mask")
    with torch.no_grad():
        q, k, _ = model.heads(x)
    logits, entropies, most = [], [], []
    for n in range(N):
        for h in range(H):
            for t in range(x.shape[1]):
                allowed = range(t + 1 if causal else x.shape[1])
                z = [float(q[n, h, t] @ k[n, h, s]) / math.sqrt(D // H) for s in allowed]
                weights = [math.exp(v) / sum(map(math.exp, z)) for v in z]
                logits += z
                entropies.append(-sum(a * math.log(a) for a in weights))
                most.append(math.log(len(z)))
    queries = len(entropies)
    return {"largest": max(logits), "entropy": sum(entropies) / queries, "entropy_share": sum(entropies) / sum(most)}


@pytest.mark.parametrize("how", SPELLINGS)
def test_every_spelling_is_read(how: str) -> None:
    torch.manual_seed(0)
    model, x = Attention(how), 3 * torch.randn(N, T, D)
    values, names = read(model, [(x, x)])
    assert names == ["model"]
    for name, expected in by_hand(model, x).items():
        assert float(values[name]) == pytest.approx(expected, rel=1e-4), name
    assert values["largest_logit"].tolist() == [pytest.approx(float(values["largest"]))]
    assert values["mean_entropy"].tolist() == [pytest.approx(float(values["entropy"]))]
    assert float(values["lowest_entropy"]) == pytest.approx(float(values["entropy"]))


@pytest.mark.parametrize("trained", [True, False])
def test_modules_of_torch_are_read_in_both_modes(trained: bool) -> None:
    """In eval mode torch has a fused encoder layer in which nothing would be seen."""
    torch.manual_seed(0)
    model = VisionTransformer().train(trained)
    values, names = read(model, [(torch.randn(2, 1, 6, 6), torch.randn(2, 3))])
    assert names == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert float(values["entropy"]) == pytest.approx(float(values["mean_entropy"].mean()))
    assert float(values["lowest_entropy"]) == pytest.approx(float(values["mean_entropy"].min()))
    assert float(values["largest"]) == pytest.approx(float(values["largest_logit"].max()))


def test_multihead_attention_agrees_with_its_own_weights() -> None:
    torch.manual_seed(0)
    model, x = CrossAttention(), torch.randn(6, 3, 4)
    values, names = read(model, [(x, torch.randn(6, 3))])
    with torch.no_grad():
        weights = model.attention(model.query(x), x + model.table[:3], x, average_attn_weights=False)[1]
    assert names == ["attention"]
    assert float(values["entropy"]) == pytest.approx(float(-(weights * weights.log()).sum(-1).mean()), rel=1e-5)


def test_other_models() -> None:
    built = build(BY_NAME["tied_attention"])
    values, _ = read(built.model, [built.batch], built.loss)
    assert 0 < float(values["entropy_share"]) <= 1
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (6, 5))
    assert read(SequenceFirst(), [(tokens, torch.randn(6, 3))])[1] == ["encoder.self_attn"]


def test_micro_batches_are_pooled() -> None:
    torch.manual_seed(0)
    model = Attention("product")
    a, b = 3 * torch.randn(N, T, D), torch.randn(N, 2, D)
    values, _ = read(model, [(a, a), (b, b)])
    one, two = by_hand(model, a), by_hand(model, b)
    assert float(values["largest"]) == pytest.approx(max(one["largest"], two["largest"]), rel=1e-4)
    assert float(values["entropy"]) == pytest.approx((5 * one["entropy"] + 2 * two["entropy"]) / 7, rel=1e-4)


def test_identities_at_both_ends() -> None:
    torch.manual_seed(0)
    model, x = Attention("sdpa"), torch.randn(N, T, D)
    with torch.no_grad():
        model.qkv.weight.mul_(0)
    values, _ = read(model, [(x, x)])
    assert float(values["entropy_share"]) == pytest.approx(1)
    assert float(values["entropy"]) == pytest.approx(math.log(T))
    torch.nn.init.normal_(model.qkv.weight, std=100)
    values, _ = read(model, [(x, x)])
    assert float(values["entropy"]) < 0.05
    assert float(values["largest"]) > 1e3


class Padded(nn.Module):
    """The last example is padding alone: all its keys are masked."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.mask, self.inner = mask, Attention("product")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner.heads(x)
        z = q @ k.transpose(-1, -2) / math.sqrt(D // H)
        padding = torch.zeros(N, 1, 1, x.shape[1])
        padding[-1] = self.mask
        return ((z + padding).softmax(-1).nan_to_num() @ v).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("mask", [-math.inf, -1e4, torch.finfo(torch.float32).min])
def test_queries_without_keys_are_left_out(mask: float) -> None:
    torch.manual_seed(0)
    model, x = Padded(mask), torch.randn(N, T, D)
    values, names = read(model, [(x, x)])
    with torch.no_grad():
        q, k, _ = model.inner.heads(x)
    z = (q @ k.transpose(-1, -2))[:-1] / math.sqrt(D // H)
    a = z.softmax(-1)
    assert names == ["model"]
    assert float(values["largest"]) == pytest.approx(float(z.max()), rel=1e-5)
    assert float(values["entropy"]) == pytest.approx(float(-(a * a.log()).sum(-1).mean()), rel=1e-5)


def test_logits_that_are_not_finite_show() -> None:
    model, x = Attention("product"), torch.full((N, T, D), float("nan"))
    values, _ = read(model, [(x, x)])
    assert math.isnan(float(values["largest"]))
    assert math.isnan(float(values["entropy"]))


class Routed(nn.Module):
    """A softmax over experts, one whose weights are features of a layer, one that ends, one over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.experts = nn.Linear(D, T), nn.Parameter(torch.randn(T, D))
        self.features = nn.Linear(T * T, D)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.route(x).softmax(-1)
        mixed = (gates.unsqueeze(-1) * self.experts).sum(-2)
        self.kept = self.route(mixed).softmax(-1)
        mixed = mixed + self.features(gates.flatten(1)).unsqueeze(1)
        return mixed + x.transpose(1, 2).softmax(1).transpose(1, 2)


def test_other_softmaxes_are_not_attention() -> None:
    x = torch.randn(N, T, D)
    with pytest.raises(Refusal, match="no attention was seen"):
        read(Routed(), [(x, x)])
    with pytest.raises(Refusal, match="no attention was seen"):
        read(nn.Linear(D, D), [(x, x)])


def test_a_softmax_of_the_loss_is_not_the_models() -> None:
    def losses(call: Any, batch: Any) -> Tensor:
        h = call(batch[0])
        return ((h @ h.transpose(1, 2)).softmax(-1) @ h).square().mean((1, 2))

    x = torch.randn(N, T, D)
    with pytest.raises(Refusal):
        read(nn.Linear(D, D), [(x, x)], losses)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_refused_by_name() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    class Flex(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            return flex.flex_attention(q, k, v).transpose(1, 2).reshape(x.shape)

    x = torch.randn(N, T, D)
    with pytest.raises(Refusal, match="flex_attention"):
        read(Flex(""), [(x, x)])
