"""Moments of the inputs against sums over single numbers, and what counts as an input."""

import math
import statistics
from collections import Counter, UserDict
from typing import Any

import pytest
import torch
from cases import CASES, Case, build
from torch import Tensor, nn

from instruments import Probe, Refusal, View
from instruments.batch.input_moments import InputMoments
from instruments.objective import as_objective


def read(batches: list[Any]) -> dict[str, float]:
    instrument = InputMoments()
    with Probe(nn.Linear(1, 1), as_objective(nn.MSELoss()), [], batches) as probe:
        view = View(probe, instrument.needs)
        values = {name: float(value) for name, value in instrument.read(view).items()}  # type: ignore[arg-type]
    assert view.meter.gradients == 0
    return values


def floats_by_hand(tensors: list[Tensor]) -> dict[str, float]:
    numbers = [v for t in tensors for v in t.flatten().tolist()]
    finite = [v for v in numbers if math.isfinite(v)]
    return {
        "mean": statistics.fmean(finite),
        "std": statistics.pstdev(finite),
        "min": min(finite),
        "max": max(finite),
        "zeros": sum(v == 0 for v in numbers) / len(numbers),
        "not_finite": 1 - len(finite) / len(numbers),
    }


def whole_by_hand(t: Tensor) -> dict[str, float]:
    counts = Counter(t.flatten().tolist())
    return {"distinct": len(counts), "top_share": max(counts.values()) / t.numel()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inputs_of_every_case(case: Case) -> None:
    batch = build(case).batch
    x = batch["x"] if isinstance(batch, dict) else batch[0]
    expected = floats_by_hand([x]) if x.is_floating_point() else whole_by_hand(x)
    values = read([batch])
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert all(math.isnan(value) for name, value in values.items() if name not in expected)


def test_broken_numbers_are_counted_and_the_rest_is_read() -> None:
    x = torch.tensor([[0.0, 1.0, float("nan")], [-2.0, float("inf"), 0.0]])
    values = read([(x, torch.zeros(2))])
    expected = floats_by_hand([x])
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert expected["not_finite"] == pytest.approx(1 / 3)
    nothing = read([(torch.full((2, 2), float("nan")), torch.zeros(2))])
    assert math.isnan(nothing["mean"])
    assert nothing["not_finite"] == 1.0


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_tokens_of_a_mapping_with_masks_and_labels(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (4, 16), generator=generator)
    batch = kind(input_ids=tokens, attention_mask=torch.ones(4, 16, dtype=torch.long), labels=torch.arange(64))
    values = read([batch])
    expected = whole_by_hand(tokens)
    assert {name: values[name] for name in expected} == expected
    assert math.isnan(values["mean"])


def test_micro_batches_are_one_batch() -> None:
    x, tokens = torch.randn(6, 3), torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(0))
    y = torch.zeros(6)
    whole = read([((x, tokens), y)])
    assert read([((x[:2], tokens[:2]), y[:2]), ((x[2:], tokens[2:]), y[2:])]) == pytest.approx(whole, rel=1e-5)
    assert whole["distinct"] == whole_by_hand(tokens)["distinct"]


def test_several_inputs_and_triples() -> None:
    a, b, y = torch.randn(4, 2), torch.randn(4, 3) + 5, torch.randn(4)
    assert read([((a, b), y)])["mean"] == pytest.approx(floats_by_hand([a, b])["mean"])
    assert read([(a, b, y)])["mean"] == pytest.approx(floats_by_hand([a, b, y])["mean"])


def test_half_precision_and_bytes() -> None:
    x = torch.full((100, 100), 300.0, dtype=torch.float16)
    assert read([(x, x)])["mean"] == pytest.approx(300)
    pixels = torch.arange(256, dtype=torch.uint8)
    assert read([(pixels, pixels)])["distinct"] == 256


def test_refusals() -> None:
    with pytest.raises(Refusal, match="no input tensor"):
        read([(torch.ones(3, dtype=torch.bool), torch.ones(3))])
    with pytest.raises(Refusal, match="sparse"):
        read([(torch.eye(3).to_sparse(), torch.ones(3))])
