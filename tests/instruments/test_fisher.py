"""Fisher operators: the empirical one against a loop over examples, the drawn one against the Gauss-Newton matrix."""

from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Built, Case, build
from gauss_newton_twin import dense_gauss_newton, matrix_of, pinned
from torch import Tensor, nn
from twins import example_gradients

from instruments.guard import RandomStates, untouched
from instruments.layout import Layout
from instruments.objective import as_objective
from instruments.operators.fisher import empirical_fisher, monte_carlo_fisher
from instruments.operators.predictive import Bernoulli, DrawnTargets
from instruments.refusal import Refusal
from instruments.samples.problem import SampleProblem

EXAMPLES = [case for case in CASES if case.examples and not case.random]


def problem_of(model: nn.Module, loss: Any) -> SampleProblem:
    return SampleProblem(model, Layout.of(model), as_objective(loss), lambda: pinned(True))


def empirical(model: nn.Module, loss: Any, batches: list[Any], kept: bool = True) -> Tensor:
    return matrix_of(empirical_fisher(problem_of(model, loss), batches, keep_graphs=kept, context=pinned))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.name)
def test_empirical_fisher_is_the_second_moment_of_example_gradients(case: Case, kept: bool) -> None:
    built = build(case)
    g_ND = example_gradients(built.model, built.loss, built.batch)
    measured = empirical(built.model, built.loss, [built.batch], kept)
    assert torch.allclose(measured, g_ND.T @ g_ND / g_ND.shape[0], atol=1e-10)
    assert float(measured.abs().max()) > 1e-4


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "rebuilt"])
def test_unequal_batches_are_one_set_of_examples(kept: bool) -> None:
    built = build(BY_NAME["mlp_weighted"])
    x, y = built.batch
    g_ND = example_gradients(built.model, built.loss, built.batch)
    measured = empirical(built.model, built.loss, [(x[:4], y[:4]), (x[4:], y[4:])], kept)
    assert torch.allclose(measured, g_ND.T @ g_ND / 6, atol=1e-12)


def test_examples_that_are_none_are_refused() -> None:
    built = build(BY_NAME["batch_norm_train"])
    with untouched(built.model), pytest.raises(Refusal, match="BatchNorm1d '1' in training mode"):
        empirical(built.model, built.loss, [built.batch])
    built = build(BY_NAME["mlp"])

    def contrastive(call: Any, batch: Any) -> Tensor:
        z = call(batch)
        return (z - z.mean(0)).square().sum(1)

    for loss, reason in [(contrastive, "interact"), (lambda call, b: call(b).sum(), "single number")]:
        with pytest.raises(Refusal, match=reason):
            empirical(built.model, loss, [built.batch[0]])


def soft() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.rand(6, 3).softmax(1)


DRAWN = [
    BY_NAME["mlp"],
    BY_NAME["mlp_sum"],
    BY_NAME["mlp_weighted"],
    BY_NAME["mlp_squared"],
    BY_NAME["mlp_binary"],
    BY_NAME["batch_norm_train"],
    BY_NAME["dropout"],
    BY_NAME["tied_attention"],
    BY_NAME["called_twice_unused"],
    Case(
        "weighted_and_smoothed",
        BY_NAME["mlp"].model,
        BY_NAME["mlp"].batch,
        lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]), label_smoothing=0.3),
    ),
]


def assert_mean_is(sampled: Tensor, expected: Tensor) -> None:
    """Matrices of independent draws, stacked: is their mean the expected one, within its own scatter?"""
    n = sampled.shape[0]
    distance = float((sampled.mean(0) - expected).square().sum())
    scatter = float(sampled.var(0).sum()) / n  # what the squared distance is on average
    assert distance < 4 * scatter
    assert scatter < 0.015 * float(expected.square().sum())  # sharp enough to see a factor


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_drawn_fisher_has_the_gauss_newton_matrix_as_its_mean(case: Case) -> None:
    built = build(case)
    with untouched(built.model):
        problem = problem_of(built.model, built.loss)
        sampled = torch.stack(
            [
                matrix_of(monte_carlo_fisher(problem, [built.batch], seed=seed, draws=100, context=pinned))
                for seed in range(6)
            ]
        )
    assert_mean_is(sampled, dense_gauss_newton(built))


def soft_share(loss: nn.CrossEntropyLoss, built: Built) -> Tensor:
    """Class probabilities as targets: the same with sum_k w_k y_k as the share of each example."""
    z = built.model(built.batch[0]).detach()
    y = built.batch[1] * (1 - loss.label_smoothing) + loss.label_smoothing / z.shape[1]
    share_N = (y * loss.weight).sum(1) / z.shape[0]
    plain = Built(built.model, nn.CrossEntropyLoss(reduction="sum"), (built.batch[0], torch.zeros(6).long()))
    parts = [
        dense_gauss_newton(Built(plain.model, plain.loss, (plain.batch[0][i : i + 1], plain.batch[1][i : i + 1])))
        for i in range(6)
    ]
    return sum(share * part for share, part in zip(share_N, parts, strict=True))


def test_class_probabilities_as_targets() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.2)
    built = build(Case("soft", BY_NAME["mlp"].model, soft, lambda: loss))
    problem = problem_of(built.model, loss)
    sampled = torch.stack(
        [matrix_of(monte_carlo_fisher(problem, [built.batch], seed=s, draws=100, context=pinned)) for s in range(6)]
    )
    assert_mean_is(sampled, soft_share(loss, built))


def test_positive_weights_of_binary_targets() -> None:
    """c_e = weight (1 + (pos_weight - 1) y), against the second derivative of the loss itself."""
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 2, (6, 3)).double()
    loss = nn.BCEWithLogitsLoss(
        weight=torch.rand(3, dtype=torch.float64), pos_weight=torch.tensor([1.0, 4.0, 0.5]), reduction="sum"
    )
    g = torch.autograd.grad(loss(z, y), z, create_graph=True)[0]
    second = torch.autograd.grad(g.sum(), z)[0]
    p = z.sigmoid()
    assert torch.allclose(Bernoulli().coefficients(loss, z, y) * p * (1 - p), second)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unequal_batches_weigh_as_for_gauss_newton(reduction: str) -> None:
    built = build(BY_NAME["mlp"])
    x, y = built.batch
    loss = nn.CrossEntropyLoss(reduction=reduction)
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    problem = problem_of(built.model, loss)
    sampled = torch.stack(
        [matrix_of(monte_carlo_fisher(problem, parts, seed=s, draws=100, context=pinned)) for s in range(6)]
    )
    first, second = (dense_gauss_newton(Built(built.model, loss, part)) for part in parts)
    assert_mean_is(sampled, (4 * first + 2 * second) / 6)  # by examples, for either reduction


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "rebuilt"])
def test_a_seed_is_one_matrix_and_moves_no_global_generator(kept: bool) -> None:
    built = build(BY_NAME["mlp_binary"])
    problem = SampleProblem(built.model, Layout.of(built.model), as_objective(built.loss), lambda: pinned(False))
    before = RandomStates.of(built.model)
    one, same, other = (
        matrix_of(monte_carlo_fisher(problem, [built.batch], seed=s, keep_graphs=kept)) for s in (1, 1, 2)
    )
    assert not before.moved()
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)


def test_targets_stay_drawn_even_if_the_outputs_do_not_repeat() -> None:
    """Kernels of an accelerator may differ in the last bit from call to call; the matrix must not jump with them."""
    built = build(BY_NAME["mlp"])
    drawn = DrawnTargets(as_objective(built.loss), built.batch, seed=0, stream=0, draws=3)
    drawn.evaluate(built.model)
    assert drawn._drawn is not None
    first = drawn._drawn.clone()
    drawn.evaluate(lambda x: 10 * built.model(x).flip(1))
    assert torch.equal(drawn._drawn, first)
    assert first.shape == (18,)


def test_losses_without_a_known_distribution_are_refused_by_name() -> None:
    built = build(BY_NAME["mlp_squared"])
    for loss, name in [(nn.L1Loss(), "L1Loss"), (lambda call, b: call(b[0]).sum(1), "a loss function")]:
        with pytest.raises(Refusal, match=f"distribution that {name} stands for"):
            monte_carlo_fisher(problem_of(built.model, loss), [built.batch], seed=0)
    x, y = built.batch
    with pytest.raises(Refusal, match="element by element"), pytest.warns(UserWarning, match="broadcast"):
        monte_carlo_fisher(problem_of(built.model, nn.MSELoss()), [(x, y[:, :1])], seed=0)
    with pytest.raises(ValueError, match="at least one draw"):
        monte_carlo_fisher(problem_of(built.model, nn.MSELoss()), [built.batch], seed=0, draws=0)
