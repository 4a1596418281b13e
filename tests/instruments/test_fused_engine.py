"""The fused engine: right on models of every kind, and never wrong without noticing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_samples import EVERYTHING, assert_moments, measure
from torch import Tensor, nn
from twins import example_gradients
from zoo import ZOO, N, Odd, Recurrent

from instruments import Probe, ProbeSettings, Refusal
from instruments.meter import Meter
from instruments.objective import as_objective
from instruments.samples import fused_engine, rules
from instruments.samples.axes import ExampleAxis, find_axes, profile
from instruments.samples.factors import Direct


def built(odd: Odd, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, x, y = odd.model().to(dtype), odd.inputs(), torch.randint(0, 3, (N,))
    return model, (x.to(dtype) if x.is_floating_point() else x, y)


@pytest.mark.parametrize("odd", ZOO, ids=lambda odd: odd.name)
def test_equals_one_example_at_a_time(odd: Odd) -> None:
    model, batch = built(odd)
    loss = nn.CrossEntropyLoss()
    moments = measure(model, loss, [batch], "auto", EVERYTHING)
    assert moments.engine == odd.engine
    assert_moments(moments, example_gradients(model, loss, batch))


def test_single_precision_lstm_goes_elsewhere_and_is_right() -> None:
    model, batch = built(Odd("lstm", lambda: Recurrent(nn.LSTM), lambda: torch.randn(N, 3, 4)), torch.float32)
    loss = nn.CrossEntropyLoss()
    assert_moments(measure(model, loss, [batch], "auto", EVERYTHING), example_gradients(model, loss, batch), 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2),
    st.integers(2, 7), st.booleans(),
)  # fmt: skip
def test_convolutions_of_any_shape(
    inputs: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int, examples: int, transposed: bool
) -> None:
    torch.manual_seed(0)
    groups = 2
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(
        groups * inputs, groups * outputs, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
    ).double()
    x = torch.randn(examples, groups * inputs, 6, 7, dtype=torch.float64)
    try:
        layer(x)
    except RuntimeError:
        return  # no output left

    def losses(call: Any, batch: Any) -> Tensor:
        return call(batch[0]).sin().flatten(1).sum(1)

    moments = measure(layer, losses, [(x,)], "fused", EVERYTHING)
    assert moments.engine == "fused"
    assert_moments(moments, example_gradients(layer, losses, (x,)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 5), st.integers(1, 4), st.booleans(), st.booleans())
def test_linear_layers_over_any_leading_dimensions(
    before: int, after: int, examples: int, width: int, bias: bool, first: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, width, bias=bias).double()
    batch = (torch.randn(examples, before, after, 3, dtype=torch.float64),)

    def losses(call: Any, pair: Any) -> Tensor:
        out = call(pair[0]) if first else call(pair[0].movedim(0, 1)).movedim(1, 0)
        return out.sin().flatten(1).sum(1)

    moments = measure(layer, losses, [batch], "fused", EVERYTHING)
    assert moments.engine == "fused"
    assert_moments(moments, example_gradients(layer, losses, batch))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 4), st.integers(0, 1))
def test_the_axis_is_found_and_put_first(outer: int, examples: int, inner: int, dim: int) -> None:
    size = outer * examples * inner
    owner = torch.arange(size) // inner % examples
    shape = (size, 3) if dim == 0 else (3, size)
    owners = owner.unsqueeze(1 - dim).expand(shape)
    axis = next(find_axes([(k, profile((owners == k).double(), examples)) for k in range(examples)], examples), None)
    assert axis is not None
    firsts = axis.first(owners)
    assert firsts.shape[0] == examples
    assert all((firsts[k] == k).all() for k in range(examples))


def test_no_axis_where_examples_mix() -> None:
    seen = [(k, profile(torch.ones(6, 2), 6)) for k in range(3)]
    assert next(find_axes(seen, 6), None) is None


@pytest.mark.parametrize("name", ["AddmmBackward0", "NativeLayerNormBackward0"])
def test_a_wrong_rule_is_noticed_and_its_parameters_read_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check against whole gradients of single examples does not trust the rules."""
    right = rules.RULES[name]

    def wrong(use: Any, axis: ExampleAxis, delta: Tensor) -> Any:
        made = right(use, axis, delta)
        return Direct(made.rows(slice(None)) * 1.01) if made is not None else None

    monkeypatch.setattr(rules, "RULES", {**rules.RULES, name: wrong})
    model, batch = built(Odd("norm", lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
                             lambda: torch.randn(N, 4)))  # fmt: skip
    loss = nn.CrossEntropyLoss()
    moments = measure(model, loss, [batch], "auto", EVERYTHING)
    assert "torch.func for" in moments.engine
    assert_moments(moments, example_gradients(model, loss, batch))


def test_a_graph_is_checked_once_and_again_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    explore = fused_engine.explore

    def counting(*args: Any) -> Any:
        passes.append(1)
        return explore(*args)

    monkeypatch.setattr(fused_engine, "explore", counting)
    model, (x, y) = built(ZOO[0])
    plans: dict[Any, Any] = {}
    objective = as_objective(nn.CrossEntropyLoss())
    for batch in ((x, y), (x, y), (x[:4], y[:4]), (x, y)):
        with Probe(model, objective, [], [batch], plans=plans) as probe:
            moments = probe.samples.moments(Meter(), EVERYTHING)
        assert_moments(moments, example_gradients(model, nn.CrossEntropyLoss(), batch))
    assert len(passes) == 2


def test_a_broken_model_is_not_remembered() -> None:
    model, batch = built(ZOO[0])
    plans: dict[Any, Any] = {}
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with Probe(model, as_objective(nn.CrossEntropyLoss()), [], [batch], plans=plans) as probe:
        moments = probe.samples.moments(Meter(), EVERYTHING)
    assert moments.norms_sq_N.isnan().all()
    assert not plans["graphs"]


def test_padding_and_sparse_rows_of_a_table() -> None:
    torch.manual_seed(0)
    for sparse in (False, True):
        model = nn.Sequential(nn.Embedding(7, 3, padding_idx=1, sparse=sparse), nn.Flatten(), nn.Linear(12, 3)).double()
        batch = (torch.randint(0, 4, (N, 4)), torch.randint(0, 3, (N,)))
        moments = measure(model, nn.CrossEntropyLoss(), [batch], "fused", EVERYTHING)
        assert moments.engine == "fused"
        assert_moments(moments, example_gradients(model, nn.CrossEntropyLoss(), batch))


def test_counts_over_the_batch_are_not_one_examples() -> None:
    """scale_grad_by_freq divides by how often a row occurs in the batch: alone, an example has another gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(12, 3)).double()
    batch = (torch.randint(0, 4, (N, 4)), torch.randint(0, 3, (N,)))
    moments = measure(model, nn.CrossEntropyLoss(), [batch])
    expected = example_gradients(model, nn.CrossEntropyLoss(), batch)
    assert moments.engine != "fused"
    assert torch.allclose(moments.norms_sq_N, expected.square().sum(1))


def test_dropout_masks_are_those_of_the_batch() -> None:
    """One forward of the whole batch draws the masks; each example's gradient is under its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    batch = (torch.randn(1, 4, dtype=torch.float64).expand(N, 4).clone(), torch.zeros(N, dtype=torch.long))
    with Probe(model, as_objective(nn.CrossEntropyLoss()), [], [batch]) as probe:
        moments = probe.samples.moments(Meter())
        _, mean_D, _ = probe.loss_and_gradient()
    assert len(set(moments.norms_sq_N.tolist())) > 1
    assert torch.allclose(moments.mean_D, mean_D, atol=1e-12)


def test_only_the_parameters_that_are_asked_for() -> None:
    model, batch = built(ZOO[0])
    settings_ = ProbeSettings(parameters=("encoder.*.norm1.*", "cls"))
    with Probe(model, as_objective(nn.CrossEntropyLoss()), [], [batch], settings=settings_) as probe:
        moments = probe.samples.moments(Meter(), EVERYTHING)
        names = probe.layout.names
    assert (names[0], len(names)) == ("cls", 5)
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    assert_moments(moments, example_gradients(model, nn.CrossEntropyLoss(), batch))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from instruments.samples import factors

    monkeypatch.setattr(factors, "BLOCK_SCALARS", {"cpu": 50})
    for odd in (*ZOO[:3], ZOO[-2]):
        model, batch = built(odd)
        moments = measure(model, nn.CrossEntropyLoss(), [batch], "fused", EVERYTHING)
        assert_moments(moments, example_gradients(model, nn.CrossEntropyLoss(), batch))


def test_a_penalty_on_the_parameters_is_seen() -> None:
    """The graph has it, whether or not it went through the model's forward."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    batch = (torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 3, (N,)))

    def losses(call: Any, pair: Any) -> Tensor:
        return F.cross_entropy(call(pair[0]), pair[1], reduction="none") + model.weight.square().sum()

    moments = measure(model, losses, [batch])
    assert_moments_of_rows = example_gradients(model, losses, batch)
    assert torch.allclose(moments.norms_sq_N, assert_moments_of_rows.square().sum(1))


@pytest.mark.parametrize("engine", ["auto", "fused", "loop"])
def test_a_penalty_on_the_parameters_of_call_is_seen(engine: str) -> None:
    """torch.func calls a function that exchanges the parameters, which has none of its own."""
    model, batch = built(Odd("tanh", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
                             lambda: torch.randn(N, 4)))  # fmt: skip

    def losses(call: Any, pair: Any) -> Tensor:
        decay = 0.1 * sum(p.square().sum() for p in call.parameters())
        return F.cross_entropy(call(pair[0]), pair[1], reduction="none") + decay

    assert_moments(measure(model, losses, [batch], engine, EVERYTHING), example_gradients(model, losses, batch))
    with pytest.raises(Refusal, match=r"torch\.func cannot trace this model or loss: .* 'parameters'"):
        measure(model, losses, [batch], "torch.func")
