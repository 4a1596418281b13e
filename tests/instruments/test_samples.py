"""Per-example gradient statistics: every engine against a backward pass an example on batches of one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Case, build
from torch import nn
from twins import example_gradients

from instruments import Probe, ProbeSettings, Refusal
from instruments.meter import Meter
from instruments.objective import as_objective
from instruments.samples.moments import SampleMoments
from instruments.samples.problem import Want

DEFINED = [case for case in CASES if case.examples and not case.random]
BACKPACK = {
    "mlp", "mlp_sum", "mlp_weighted", "mlp_smoothed", "mlp_squared", "mlp_binary", "mlp_custom", "cnn_plain",
    "residual", "frozen",
}  # fmt: skip


EVERYTHING: frozenset[Want] = frozenset({"second_moment", "inner_products", "gram"})


def measure(
    model: nn.Module, loss: Any, batches: list[Any], engine: str = "auto", wants: frozenset[Want] = frozenset()
) -> SampleMoments:
    settings = ProbeSettings(samples=engine)  # type: ignore[arg-type]
    with Probe(model, as_objective(loss), [], batches, settings=settings) as probe:
        return probe.samples.moments(Meter(), wants)


def assert_moments(moments: SampleMoments, grads_ND: torch.Tensor, tol: float = 1e-10) -> None:
    """Every statistic against its definition on the N x D matrix, relative to its own size."""
    mean_D = grads_ND.mean(0)
    assert moments.second_D is not None
    assert moments.inner_NL is not None
    assert moments.gram_NN is not None
    pairs = (
        (moments.norms_sq_N, grads_ND.square().sum(1)),
        (moments.mean_D, mean_D),
        (moments.second_D, grads_ND.square().mean(0)),
        (moments.inner_NL.sum(1), grads_ND @ mean_D),
        (moments.gram_NN, grads_ND @ grads_ND.T),
    )
    for found, expected in pairs:
        assert (found - expected).abs().max() <= tol * (expected.abs().max() + 1e-300)


@pytest.mark.parametrize("case", DEFINED, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ["fused", "torch.func", "loop", "backpack", "auto"])
def test_engines_equal_one_example_at_a_time(case: Case, engine: str) -> None:
    built = build(case)
    if engine == "backpack" and case.name not in BACKPACK:
        with pytest.raises(Refusal):
            measure(built.model, built.loss, [built.batch], engine)
        return
    if engine == "torch.func" and case.name == "recurrent":
        with pytest.raises(Refusal, match=r"torch\.func"):
            measure(built.model, built.loss, [built.batch], engine)
        return
    expected = example_gradients(built.model, built.loss, built.batch)
    assert_moments(measure(built.model, built.loss, [built.batch], engine, EVERYTHING), expected)
    alone = measure(built.model, built.loss, [built.batch], engine)
    assert torch.allclose(alone.norms_sq_N, expected.square().sum(1), rtol=1e-10)
    assert (alone.second_D, alone.inner_NL, alone.gram_NN) == (None, None, None)


class Empty(nn.Module):
    """Parameters without an element, in products at one position and at two, and in a sum over nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out, self.none = nn.Linear(4, 3), nn.Linear(3, 3), nn.Parameter(torch.zeros(2, 0))
        self.bias, self.into = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(3, 0))
        self.back, self.last = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(3, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x.unflatten(1, (2, 4)))
        h = (h + (h @ self.into + self.bias) @ self.back).tanh().sum(1)
        return torch.cat([self.out(h), h @ self.last], 1) + self.none.sum()


@pytest.mark.parametrize("engine", ["fused", "torch.func", "loop", "auto"])
def test_parameters_without_an_element_add_nothing(engine: str) -> None:
    torch.manual_seed(0)
    model, batch = Empty().double(), (torch.randn(6, 8).double(), torch.randint(0, 3, (6,)))
    expected = example_gradients(model, nn.CrossEntropyLoss(), batch)
    assert_moments(measure(model, nn.CrossEntropyLoss(), [batch], engine, EVERYTHING), expected)


def test_auto_takes_the_cheapest_engine_that_can() -> None:
    for name, engine in (("mlp", "fused"), ("tied_attention", "fused"), ("recurrent", "fused")):
        built = build(BY_NAME[name])
        assert measure(built.model, built.loss, [built.batch]).engine == engine


@pytest.mark.parametrize("engine", ["fused", "backpack", "torch.func", "loop"])
@pytest.mark.parametrize("name", ["mlp", "mlp_weighted", "mlp_sum"])
def test_micro_batches_are_one_batch(name: str, engine: str) -> None:
    built = build(BY_NAME[name])
    x, y = built.batch
    wants: frozenset[Want] = frozenset({"second_moment", "inner_products"})
    together = measure(built.model, built.loss, [(x, y)], engine, wants)
    apart = measure(built.model, built.loss, [(x[:4], y[:4]), (x[4:], y[4:])], engine, wants)
    if name == "mlp_sum":  # two sums are averaged as losses of their batches, not added
        assert apart.examples == 6
        return
    assert torch.allclose(apart.norms_sq_N, together.norms_sq_N, rtol=1e-12)
    assert torch.allclose(apart.mean_D, together.mean_D, atol=1e-14)
    for found, expected in ((apart.second_D, together.second_D), (apart.inner_NL, together.inner_NL)):
        assert found is not None
        assert expected is not None
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_chunks_are_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(BY_NAME["layer_norm"])
    whole = measure(built.model, built.loss, [built.batch], "torch.func")
    sizes: list[int] = []
    from instruments.samples import func_engine

    real = func_engine.vmap

    def counting(f: Any, **kwargs: Any) -> Any:
        g = real(f, **kwargs)

        def call(params: Any, *rows: Any) -> Any:
            sizes.append(rows[0].shape[0])
            return g(params, *rows)

        return call

    monkeypatch.setattr(func_engine, "vmap", counting)
    monkeypatch.setattr(func_engine, "CHUNK_SCALARS", 130)
    chunked = measure(built.model, built.loss, [built.batch], "torch.func")
    assert sum(sizes) == 6
    assert max(sizes) * sum(p.numel() for p in built.model.parameters()) <= 130
    assert torch.allclose(chunked.norms_sq_N, whole.norms_sq_N, rtol=1e-12)


def test_batch_norm_in_training_mode_is_refused_by_name() -> None:
    built = build(BY_NAME["batch_norm_train"])
    with pytest.raises(Refusal, match="BatchNorm1d '1' in training mode"):
        measure(built.model, built.loss, [built.batch])


@pytest.mark.parametrize("engine", ["auto", "fused", "backpack", "torch.func", "loop"])
def test_a_loss_that_mixes_examples_is_refused_by_its_numbers(engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    batch = (torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64))

    def contrastive(call: Any, pair: Any) -> torch.Tensor:
        similarity = call(pair[0]) @ call(pair[1]).T
        return F.cross_entropy(similarity, torch.arange(len(similarity)), reduction="none")

    def batch_centred(call: Any, pair: Any) -> torch.Tensor:
        out = call(pair[0])
        return (out - out.mean(0)).square().sum(1)

    for loss in (contrastive, batch_centred):
        with pytest.raises(Refusal, match=r"interact|torch\.func cannot|twice"):
            measure(model, loss, [batch], engine)


def test_a_single_number_has_no_examples() -> None:
    built = build(BY_NAME["mlp"])
    with pytest.raises(Refusal, match="single number"):
        measure(built.model, lambda call, b: F.cross_entropy(call(b[0]), b[1]), [built.batch])


def test_a_ragged_batch_is_read_by_the_loop() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    ragged = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5, 3)]

    def losses(call: Any, batch: Any) -> torch.Tensor:
        return torch.stack([call(rows).square().mean() for rows in batch])

    moments = measure(model, losses, [ragged])
    expected = []
    for rows in ragged:
        grads = torch.autograd.grad(model(rows).square().mean(), list(model.parameters()))
        expected.append(torch.cat([g.reshape(-1) for g in grads]).square().sum())
    assert moments.engine == "loop"
    assert torch.allclose(moments.norms_sq_N, torch.stack(expected))


def test_dropout_draws_a_mask_for_every_example() -> None:
    built = build(BY_NAME["dropout"])
    x = built.batch[0][:1].expand(6, -1).clone()
    y = torch.zeros(6, dtype=torch.long)
    norms = measure(built.model, built.loss, [(x, y)], "torch.func").norms_sq_N
    assert len(set(norms.tolist())) > 1
    again = measure(built.model, built.loss, [(x, y)], "torch.func").norms_sq_N
    assert torch.equal(norms, again)


def test_backpack_leaves_nothing_on_the_model() -> None:
    built = build(BY_NAME["mlp"])
    before = [(set(vars(p)), p.grad) for p in built.model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in built.model.modules()]
    attributes = [set(vars(m)) for m in built.model.modules()]
    measure(built.model, built.loss, [built.batch], "backpack")
    assert before == [(set(vars(p)), p.grad) for p in built.model.parameters()]
    assert hooks == [len(m._forward_hooks) + len(m._backward_hooks) for m in built.model.modules()]
    assert attributes == [set(vars(m)) for m in built.model.modules()]
