"""Histogram of single examples' gradients: every count by hand from a loop over the examples."""

from bisect import bisect_left
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Built, Case, build
from taking import losses, mean_of, take
from torch import Tensor, nn
from twins import example_gradients

from cockpit_bench.testing import COVERING_CASES, check_instrument
from instruments import Probe, ProbeSettings, Refusal, View
from instruments.example_gradients import usual_price
from instruments.gradient.example_histogram import ExampleHistogram
from instruments.objective import as_objective

DEFINED = [case for case in CASES if case.examples and not case.random]


def counts_of(elements: list[float], limits: list[float]) -> list[int]:
    counts = [0] * len(limits)
    for g in elements:
        counts[bisect_left(limits, g)] += 1
    return counts


@pytest.mark.parametrize("case", DEFINED, ids=lambda case: case.name)
def test_every_element_of_every_example_is_in_its_bin(case: Case) -> None:
    built = build(case)
    g_ND = example_gradients(built.model, built.loss, built.batch)
    if case.name == "called_twice_unused":
        g_ND = g_ND[:, 2:]  # the parameter that nobody uses
    values, _, provenance = take(ExampleHistogram(), built)
    limits, counts = values["histogram"].tolist()
    expected = counts_of(g_ND.flatten().tolist(), limits)
    # Rounding carries what is zero in one of the two out of the middle bin.
    assert sum(abs(a - b) for a, b in zip(counts, expected, strict=True)) <= 0.01 * sum(expected)
    assert sum(counts) == g_ND.numel()
    assert float(values["largest"]) == pytest.approx(float(g_ND.abs().max()))
    assert float(values["not_finite"]) == 0
    assert provenance["examples"] == len(g_ND)


def gradients(x: Tensor, **settings: Any) -> dict[str, Any]:
    """The reading where g_i are the rows of -x."""
    return take(ExampleHistogram(**settings), mean_of(x.double()))[0]


def test_every_third_of_eight_examples() -> None:
    x = 2.0 ** torch.arange(-8, 0)[:, None].expand(8, 3)
    values = gradients(x, examples=3)
    limits, counts = values["histogram"].tolist()
    assert counts == counts_of([-v for i in (0, 3, 6) for v in x[i].tolist()], limits)
    assert float(values["largest"]) == x[6, 0]


def test_of_several_batches_every_s_th_of_all() -> None:
    x = 2.0 ** torch.arange(-8, 0)[:, None].expand(8, 3).double()
    built = mean_of(x)
    values, _, provenance = take(ExampleHistogram(examples=3), built, batches=[x[:1], x[1:4], x[4:]])
    limits, counts = values["histogram"].tolist()
    assert counts == counts_of([-v for i in (0, 3, 6) for v in x[i].tolist()], limits)
    assert provenance["examples"] == 3


def test_class_weights_are_those_of_the_whole_batch() -> None:
    """Weighted cross-entropy divides by the weights of all targets, not of those that are read."""
    built = build(BY_NAME["mlp_weighted"])
    g_ND = example_gradients(built.model, built.loss, built.batch)
    values, _, _ = take(ExampleHistogram(examples=2), built)
    assert float(values["largest"]) == pytest.approx(float(g_ND[[0, 3]].abs().max()))


class Ragged(nn.Module):
    """Sequences of different lengths, which cannot be cut into a smaller batch of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, sequences: list[Tensor]) -> Tensor:
        return torch.stack([(s @ self.w).sum() for s in sequences])


def test_a_batch_that_cannot_be_cut_is_run_whole() -> None:
    sequences = [torch.full((n, 2), float(n)).double() for n in (1, 2, 3)]
    values, _, _ = take(ExampleHistogram(examples=2), Built(Ragged(), losses, sequences))
    limits, counts = values["histogram"].tolist()
    assert counts == counts_of([1.0, 1.0, 9.0, 9.0], limits)


def test_nothing_is_cut_off() -> None:
    x = torch.tensor([[0.0, 1e-30, -1e-30, 1e30, -1e30, 1.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    values = gradients(x)
    _, counts = values["histogram"].tolist()
    assert sum(counts) == 12
    assert (counts[0], counts[-1], counts[len(counts) // 2]) == (1, 1, 6)
    assert float(values["zeros"].value) == pytest.approx((1 / 6 + 3 / 6) / 2)
    assert float(values["zeros"].stderr) == pytest.approx((3 / 6 - 1 / 6) / 2)


def test_what_is_not_finite_is_counted_apart() -> None:
    values = gradients(torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]]))
    _, counts = values["histogram"].tolist()
    assert (counts[0], counts[-1], sum(counts)) == (1, 1, 3)
    assert float(values["not_finite"]) == pytest.approx(3 / 4)
    assert torch.isnan(values["largest"])


def test_the_sample_is_bounded_and_adaptive_bins_span_it() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5000, generator=g)
    _, counts = gradients(x, sample=800)["histogram"]
    assert 700 < counts.sum() < 900
    limits, counts = gradients(x, bins="adaptive")["histogram"]
    assert counts.sum() == pytest.approx(2**14, rel=0.2)
    assert limits[-2] < 8
    assert torch.isnan(torch.as_tensor(gradients(x[:1])["zeros"].stderr))


def test_under_dropout_the_other_examples_do_not_matter() -> None:
    """Masks are drawn anew for what is read; an example that interacts with others is found without masks."""
    values, _, _ = take(ExampleHistogram(examples=3), build(BY_NAME["dropout"]))
    assert float(values["largest"]) > 0

    def contrastive(call: Any, batch: Any) -> Tensor:
        z = call(batch[0])
        return (z - z.mean(0)).square().sum(1)

    for name in ("mlp", "dropout"):
        built = build(BY_NAME[name])
        with pytest.raises(Refusal, match="interact"):
            take(ExampleHistogram(examples=3), Built(built.model, contrastive, built.batch))


@pytest.mark.parametrize(("name", "reason"), [("batch_norm_train", "in training mode mixes")])
def test_examples_that_have_no_gradient_are_refused(name: str, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        take(ExampleHistogram(), build(BY_NAME[name]))
    built = build(BY_NAME["mlp"])
    with pytest.raises(Refusal, match="single number"):
        take(ExampleHistogram(), Built(built.model, lambda call, batch: call(batch[0]).sum(), built.batch))


def test_a_loss_without_parameters_is_refused() -> None:
    built = build(BY_NAME["mlp"])
    with pytest.raises(Refusal, match="does not depend on any trained parameter"):
        take(ExampleHistogram(), Built(built.model, lambda call, batch: batch[0].sum(1), built.batch))
    settings = ProbeSettings(parameters="unused")
    twice = build(BY_NAME["called_twice_unused"])
    probe = Probe(twice.model, as_objective(twice.loss), [], [twice.batch], settings=settings)
    with probe, pytest.raises(Refusal, match="does not depend on any trained parameter"):
        ExampleHistogram().read(View(probe, ExampleHistogram.needs))


def test_settings() -> None:
    with pytest.raises(ValueError, match="at least one example, got 0"):
        ExampleHistogram(examples=0)
    with pytest.raises(ValueError, match="bins to be one of fixed, adaptive, got 'log'"):
        ExampleHistogram(bins="log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sample of at least one element"):
        ExampleHistogram(sample=0)
    assert usual_price(64, 8) == pytest.approx(1 / 3 + 8 / 64 * 17 / 3)
    assert usual_price(2, 8) == pytest.approx(1 / 3 + 5 / 3)


def test_it_conforms_where_random_numbers_are_drawn() -> None:
    cases = [case for case in COVERING_CASES if case.name in ("dropout", "accumulation", "tied attention")]
    assert check_instrument(ExampleHistogram(examples=3, bins="adaptive"), cases) == {}
