"""Diagonals of the curvature from drawn targets and by BackPACK, against dense matrices."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import BY_NAME, Built, Case, build, images, mlp, regression, rows
from gauss_newton_twin import dense_gauss_newton
from taking import take
from torch import Tensor, nn
from twins import dense_hessian
from zoo import ZOO

from cockpit_bench.testing import COVERING_CASES, check_instrument
from instruments import Probe, Refusal
from instruments.curvature.tic import Tic
from instruments.curvature.trace import CurvatureTrace
from instruments.diagonals.backpack import Extension
from instruments.diagonals.draws import Draws
from instruments.meter import Meter
from instruments.objective import as_objective
from instruments.probe_settings import ProbeSettings

DRAWS = 60
CHAINS = {
    "linear alone": (lambda: nn.Sequential(nn.Linear(4, 3)), rows),
    "nested": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Sigmoid(), nn.Linear(5, 3)), nn.SELU()), rows),
    "dilated": (lambda: convolution(nn.Conv2d(2, 1, 2, dilation=2), nn.ELU(), features=9), images),
    "pooled": (lambda: convolution(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.MaxPool2d(2), features=12), images),
    "padded": (lambda: convolution(nn.ZeroPad2d(1), nn.Conv2d(2, 1, 2), nn.LeakyReLU(), features=36), images),
    "transposed": (lambda: convolution(nn.ConvTranspose2d(2, 1, 2), nn.LogSigmoid(), features=36), images),
}


def convolution(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3, bias=False))


def chain(name: str) -> Built:
    model, batch = CHAINS[name]
    return build(Case(name, model, batch, nn.CrossEntropyLoss))


def odd(name: str) -> Built:
    """A model of the zoo with a loss."""
    (found,) = (odd for odd in ZOO if odd.name == name)
    labels = lambda: (found.inputs(), torch.randint(0, 3, (6,)))  # noqa: E731
    return build(Case(name, found.model, labels, nn.CrossEntropyLoss))


def drawn(built: Built, batches: Sequence[Any] = (), draws: int = DRAWS, step: int = 0, engine: Any = "auto") -> Draws:
    settings = ProbeSettings(samples=engine)
    given = list(batches) or [built.batch]
    with Probe(built.model, as_objective(built.loss), [], given, step=step, settings=settings) as probe:
        return probe.diagonals.drawn(draws, Meter())


def by_backpack(built: Built, extension: Extension, batches: Sequence[Any] = (), draws: int = DRAWS) -> Draws:
    with Probe(built.model, as_objective(built.loss), [], list(batches) or [built.batch]) as probe:
        return probe.diagonals.backpack(extension, draws, Meter())


def assert_mean(found: Draws, truth_D: Tensor) -> None:
    """No bias by entry, judged by the scatter of the rows; zero where the matrix is."""
    there_D = truth_D > 1e-6 * truth_D.max()
    error_D = found.rows_MD.std(0) / found.count**0.5
    z_D = ((found.values_D - truth_D) / error_D)[there_D]
    assert z_D.abs().max() < 6  # a few draws of rare targets are skew
    assert z_D.square().mean().sqrt() < 2
    assert (found.values_D[~there_D] <= 1e-5 * truth_D.max()).all()
    (trace,), (error,) = found.sums([[slice(0, len(truth_D))]])
    assert abs(trace - truth_D.sum()) <= 4 * error
    assert error < 0.2 * trace


def assert_equal(found: Draws, truth_D: Tensor) -> None:
    assert found.count == 1
    assert (found.values_D - truth_D).abs().max() <= 1e-6 * truth_D.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        "mlp_weighted", "mlp_smoothed", "mlp_binary", "cnn", "tied_attention", "called_twice_unused", "frozen",
    ],
)  # fmt: skip
def test_drawn_targets_have_the_gauss_newton_diagonal_as_their_mean(name: str) -> None:
    built = build(BY_NAME[name])
    found = drawn(built)
    assert_mean(found, dense_gauss_newton(built).diagonal())
    assert found.engine == f"{DRAWS} draws of the targets, fused"


@pytest.mark.parametrize(("name", "engine"), [("heads", "fused"), ("custom_function", "loop")])
def test_drawn_targets_on_odd_models(name: str, engine: str) -> None:
    built = odd(name)
    found = drawn(built, draws=12)
    assert engine in found.engine
    assert_mean(found, dense_gauss_newton(built).diagonal())


@pytest.mark.parametrize("engine", ["torch.func", "loop", "backpack"])
def test_engines_agree_on_the_same_targets(engine: str) -> None:
    built = build(BY_NAME["mlp"])
    found = drawn(built, draws=2, engine=engine)
    assert torch.allclose(found.rows_MD, drawn(built, draws=2).rows_MD, rtol=1e-10)
    assert found.engine == f"2 draws of the targets, {engine}"


def test_drawn_targets_under_dropout_belong_to_the_masks_of_the_gradients() -> None:
    built = build(BY_NAME["dropout"])
    assert_mean(drawn(built), dense_gauss_newton(built).diagonal())
    with pytest.raises(Refusal, match="other masks"):
        drawn(built, draws=2, engine="torch.func")


@pytest.mark.parametrize(
    ("name", "weights"), [("mlp", (4, 2)), ("mlp_sum", (4, 2)), ("mlp_weighted", None), ("mlp_squared", (4, 2))]
)
def test_batches_are_weighted_as_for_the_hessian(name: str, weights: Any) -> None:
    """By what their losses average over: examples, or the class weights of their targets."""
    built = build(BY_NAME[name])
    x, y = built.batch
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    weights = weights or [float(built.loss.weight[t].sum()) for _, t in batches]
    parts = [dense_gauss_newton(Built(built.model, built.loss, batch)).diagonal() for batch in batches]
    truth_D = sum(w * part_D for w, part_D in zip(weights, parts, strict=True)) / sum(weights)
    assert_mean(drawn(built, batches), truth_D)
    if name in ("mlp", "mlp_squared"):
        assert_equal(by_backpack(built, "DiagGGNExact", batches), truth_D)


def test_draws_differ_from_step_to_step_and_repeat_with_it() -> None:
    built = build(BY_NAME["mlp"])
    one, again, other = (drawn(built, draws=2, step=step).rows_MD for step in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one[0], one[1])
    assert not torch.isclose(one, other).all(1).any()
    assert not torch.isclose(one, drawn(built, [built.batch] * 2, draws=2, step=3).rows_MD).all(1).any()


@pytest.mark.parametrize("name", ["mlp", "mlp_squared", "frozen", *CHAINS])
def test_backpack_equals_the_dense_diagonals(name: str) -> None:
    built = chain(name) if name in CHAINS else build(BY_NAME[name])
    gauss_newton_D = dense_gauss_newton(built).diagonal()
    assert_equal(by_backpack(built, "DiagGGNExact"), gauss_newton_D)
    assert_equal(by_backpack(built, "DiagHessian"), dense_hessian(built.model, built.loss, built.batch).diagonal())
    assert_mean(by_backpack(built, "DiagGGNMC"), gauss_newton_D)


def test_backpack_sees_the_masks_of_the_other_routes() -> None:
    built = build(BY_NAME["dropout"])
    assert_equal(by_backpack(built, "DiagGGNExact"), dense_gauss_newton(built).diagonal())


def ignoring() -> tuple[Tensor, Tensor]:
    x, y = rows()
    return x, y.index_fill(0, torch.tensor([1]), -100)


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda m, i, out: 2 * out)  # type: ignore[operator]
    return model


REFUSED: dict[str, tuple[Any, Callable[[], Any], Any, str]] = {
    "groups": (BY_NAME["cnn"].model, images, nn.CrossEntropyLoss, "groups"),
    "no rule": (BY_NAME["layer_norm"].model, rows, nn.CrossEntropyLoss, "LayerNorm, which has no rule"),
    "no chain": (BY_NAME["residual"].model, rows, nn.CrossEntropyLoss, "chain of layers"),
    "hooks": (hooked, rows, nn.CrossEntropyLoss, "forward hooks"),
    "weights": (mlp, rows, BY_NAME["mlp_weighted"].loss, "class weights"),
    "ignored": (mlp, ignoring, nn.CrossEntropyLoss, "ignored"),
    "probabilities": (mlp, lambda: (rows()[0], torch.rand(6, 3).softmax(1)), nn.CrossEntropyLoss, "probabilities"),
    "loss": (mlp, regression, nn.SmoothL1Loss, "second derivatives of SmoothL1Loss"),
    "in place": (BY_NAME["in_place_relu"].model, rows, nn.CrossEntropyLoss, "BackPACK cannot read"),
    "divisor": (
        lambda: convolution(nn.Conv2d(2, 3, 2), nn.AvgPool2d(2, divisor_override=3), features=12),
        images, nn.CrossEntropyLoss, "divisor_override",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_backpack_cannot_read_or_reads_wrongly_is_refused(name: str) -> None:
    model, batch, loss, reason = REFUSED[name]
    with pytest.raises(Refusal, match=reason):
        by_backpack(build(Case(name, model, batch, loss)), "DiagGGNExact")


@pytest.mark.parametrize(
    ("name", "reason"), [("mlp_custom", "no targets can be drawn"), ("batch_norm_train", "BatchNorm1d '1' in training")]
)
def test_where_nothing_can_be_drawn(name: str, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        drawn(build(BY_NAME[name]), draws=2)


def test_the_jackknife_takes_the_bias_out_and_its_error_covers() -> None:
    """1/mean of eight numbers of mean one is too large by more than a hundredth; a single row is exact."""
    g = torch.Generator().manual_seed(0)
    rows_RM = 1 + 0.4 * torch.randn(600, 8, generator=g, dtype=torch.float64)
    found = [Draws(row_M[:, None], "").jackknife(lambda h_D: 1 / h_D.sum()) for row_M in rows_RM]
    value_R, error_R = (torch.stack(list(part)) for part in zip(*found, strict=True))
    plain_R = 1 / rows_RM.mean(1)
    assert plain_R.mean() > 1.015
    assert abs(value_R.mean() - 1) < 0.006
    assert 0.8 < error_R.square().mean().sqrt() / value_R.std() < 1.2
    assert ((value_R - 1).abs() <= 3 * error_R).double().mean() > 0.95
    value, error = Draws(torch.tensor([[2.0]]), "").jackknife(lambda h_D: h_D.sum() ** 2)
    assert (float(value), float(error)) == (4.0, 0.0)


def test_the_traces_by_layer_are_those_of_the_blocks() -> None:
    built = build(BY_NAME["mlp"])
    blocks = torch.stack([d.sum() for d in dense_gauss_newton(built).diagonal().split([20, 5, 15, 3])])
    hessian = dense_hessian(built.model, built.loss, built.batch).diagonal().split([20, 5, 15, 3])
    exact, _, provenance = take(CurvatureTrace(engine="backpack"), built)
    assert torch.allclose(exact["per_layer"], blocks, rtol=1e-6)
    assert exact["per_layer_stderr"].eq(0).all()
    assert float(exact["trace"].stderr) == 0
    assert (provenance["diagonal"], provenance["batch"]) == ("BackPACK DiagGGNExact", "held")
    found, _, _ = take(CurvatureTrace(engine="backpack", matrix="hessian"), built)
    assert torch.allclose(found["per_layer"], torch.stack([d.sum() for d in hessian]), rtol=1e-6, atol=1e-8)
    for engine in ("drawn", "backpack_mc"):
        found, _, provenance = take(CurvatureTrace(engine=engine, draws=30), built)  # type: ignore[arg-type]
        assert ((found["per_layer"] - blocks).abs() <= 4 * found["per_layer_stderr"]).all()
        assert "30 draws of the targets" in provenance["diagonal"]


def test_the_standard_error_over_draws_covers() -> None:
    built = build(BY_NAME["mlp"])
    truth = float(dense_gauss_newton(built).trace())
    found = [take(CurvatureTrace(engine="drawn"), built, step=step)[0]["trace"] for step in range(40)]
    z_R = torch.tensor([(float(f.value) - truth) / float(f.stderr) for f in found])
    assert (z_R.abs() <= 3).double().mean() >= 0.94  # Student's t with seven degrees of freedom: 0.98
    assert 0.8 < z_R.square().mean().sqrt() < 1.6


def large() -> Built:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return Built(model, nn.CrossEntropyLoss(), (torch.randn(256, 64), torch.randint(0, 10, (256,))))


def test_the_diagonal_form_is_known_at_26_thousand_parameters() -> None:
    """Random signs floor a third of the entries there."""
    truth, _, _ = take(Tic(engine="backpack"), large())
    found, _, provenance = take(Tic(), large())
    value, error = float(found["tic_diagonal"].value), float(found["tic_diagonal"].stderr)
    assert abs(value - float(truth["tic_diagonal"].value)) <= 4 * error
    assert error < 0.05 * value
    assert float(found["floored"]) < 0.01
    assert provenance["diagonal"] == "8 draws of the targets, fused"
    signs, _, provenance = take(Tic(engine="probes"), large())
    assert float(signs["floored"]) > 0.3
    assert torch.isnan(torch.as_tensor(signs["tic_diagonal"].value))
    assert provenance["diagonal"] == "16 random signs"


def test_random_signs_stand_in_where_nothing_can_be_drawn() -> None:
    built = build(BY_NAME["mlp_custom"])
    _, _, provenance = take(Tic(), built)
    assert provenance["diagonal"] == "16 random signs"
    with pytest.raises(Refusal, match="no targets can be drawn"):
        take(Tic(engine="drawn"), built)


@pytest.mark.parametrize(
    "instrument",
    [
        Tic(engine="backpack"), CurvatureTrace(engine="drawn", draws=2),
        CurvatureTrace(engine="backpack_mc", draws=2),
    ],
    ids=lambda instrument: f"{type(instrument).__name__}, {instrument.engine}",
)  # fmt: skip
def test_every_engine_conforms(instrument: Any) -> None:
    cases = [case for case in COVERING_CASES if case.name == "mlp"]
    assert check_instrument(instrument, cases) == {}


@pytest.mark.parametrize("kind", [Tic, CurvatureTrace])
def test_settings_that_mean_nothing_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="engine to be one of probes, drawn, backpack, backpack_mc, got 'exact'"):
        kind(engine="exact")
    with pytest.raises(ValueError, match="take engine='probes' or 'backpack' for the Hessian"):
        kind(engine="drawn", matrix="hessian")
    with pytest.raises(ValueError, match="draws of at least 2, got 1"):
        kind(engine="drawn", draws=1)
    assert Tic(matrix="hessian").needs == {"samples", "second_moment", "hessian"}
