"""Label counts and their chi-square against contingency tables, and against what shuffling gives."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from scipy import stats
from torch import nn

from instruments import Probe, Refusal, View
from instruments.batch.label_counts import LabelCounts, homogeneity
from instruments.instrument import State
from instruments.objective import as_objective


def advance(batches: list[Any], state: State | None = None, instrument: LabelCounts | None = None) -> Any:
    instrument = instrument or LabelCounts()
    with Probe(nn.Linear(1, 1), as_objective(nn.MSELoss()), [], batches) as probe:
        return instrument.advance(View(probe, instrument.needs), state or instrument.init())


def of(labels: Any) -> list[Any]:
    y = torch.as_tensor(labels)
    return [(torch.zeros(len(y), 1), y)]


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.loss(), nn.CrossEntropyLoss)], ids=lambda c: c.name)
def test_counts_of_every_case(case: Case) -> None:
    batch = build(case).batch
    values, _ = advance([batch])
    labels = [c for c in batch[1].flatten().tolist() if c >= 0]
    counts = Counter(labels)
    assert dict(zip(*values["counts"].tolist(), strict=True)) == {c: counts[c] for c in range(max(labels) + 1)}
    assert values["classes"] == len(counts)
    assert float(values["majority"]) == pytest.approx(max(counts.values()) / len(labels))
    assert math.isnan(values["chi2"])
    shares = [n / len(labels) for n in counts.values()]
    assert float(values["running_entropy"]) == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert float(values["running_majority"]) == pytest.approx(max(shares))


@pytest.mark.parametrize("seed", range(10))
def test_chi_square_is_that_of_the_contingency_table(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, batch = rng.choice(6, 80, p=[0.4, 0.2, 0.2, 0.1, 0.1, 0]), rng.integers(0, 6, 20)
    _, state = advance(of(before))
    values, state = advance(of(batch), state)
    table = np.stack([np.bincount(labels, minlength=6) for labels in (batch, before)])
    table = table[:, table.sum(0) > 0]
    expected = stats.chi2_contingency(table, correction=False)
    assert values["chi2"] == pytest.approx(expected.statistic)
    assert float(values["p_value"]) == pytest.approx(expected.pvalue, rel=1e-6)
    assert values["expected"] == expected.dof
    share = np.bincount([*before, *batch]) / 100
    assert float(values["running_entropy"]) == pytest.approx(stats.entropy(share))
    assert state["counts"].sum() == 100


def test_a_long_memory_gives_the_test_against_a_known_marginal() -> None:
    p = np.array([0.5, 0.3, 0.2])
    batch = np.array([10, 2, 8])
    chi2, freedom = homogeneity(torch.tensor(batch).double(), torch.tensor(p * 1e9))
    assert chi2 == pytest.approx(float(((batch - 20 * p) ** 2 / (20 * p)).sum()), rel=1e-6)
    assert freedom == 2


def test_shuffled_labels_give_the_expected_value_and_uniform_p_values() -> None:
    """With fixed margins the mean of chi-square is (C - 1) N / (N - 1), whatever the shares of the classes."""
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 400, p=[0.55, 0.25, 0.15, 0.05])
    found, upper = [], []
    for _ in range(3000):
        rng.shuffle(labels)
        n, m = (torch.from_numpy(np.bincount(part, minlength=4)).double() for part in (labels[:100], labels[100:]))
        chi2, freedom = homogeneity(n, m)
        found.append(chi2)
        upper.append(stats.chi2.sf(chi2, freedom) < 0.05)
    error = float(np.std(found) / math.sqrt(len(found)))
    assert abs(np.mean(found) - 3 * 400 / 399) < 4 * error
    assert float(np.mean(upper)) == pytest.approx(0.05, abs=0.02)


def test_sorted_labels_stand_out() -> None:
    labels = torch.arange(10).repeat_interleave(64)
    state, chi2 = None, []
    for batch in labels.split(64):
        values, state = advance(of(batch), state)
        chi2.append(values["chi2"] / max(values["expected"], 1))
        assert values["classes"] == 1
        assert float(values["majority"]) == 1.0
    assert all(value > 4 for value in chi2[1:])
    assert float(values["p_value"]) < 1e-10
    assert float(values["running_entropy"]) == pytest.approx(math.log(10))


def test_one_class_has_nothing_to_be_compared() -> None:
    _, state = advance(of([2, 2]))
    values, _ = advance(of([2]), state)
    assert values["chi2"] == pytest.approx(0, abs=1e-20)
    assert values["expected"] == 0
    assert math.isnan(values["p_value"])


def test_micro_batches_booleans_mappings_and_memory() -> None:
    y = torch.tensor([0, 2, 2, 5])
    whole, state = advance(of(y))
    parts, state_too = advance([*of(y[:1]), *of(y[1:])])
    assert np.array_equal(whole["counts"], parts["counts"])
    assert torch.equal(state["counts"], state_too["counts"])
    assert advance(of([True, False, True]))[0]["counts"].tolist() == [[0, 1], [1, 2]]
    assert advance([{"input_ids": y, "labels": y}])[0]["classes"] == 3
    assert advance([({"x": y}, [y])])[0]["classes"] == 3
    kept = state["counts"].clone()
    advance(of([1, 1]), state)
    assert torch.equal(state["counts"], kept)  # what was passed in is not written to


def test_many_classes_share_bins() -> None:
    values, _ = advance(of(torch.tensor([0, 1, 2, 999, 999])))
    limits, counts = values["counts"]
    assert len(limits) == 200
    assert (limits[0], limits[-1], np.diff(limits).tolist()) == (4, 999, [5] * 199)
    assert (counts[0], counts[-1], counts.sum()) == (3, 2, 5)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (build(BY_NAME["mlp_squared"]).batch, "no classes"),
        ({"x": torch.ones(2)}, "expected integer labels"),
        (torch.ones(2, 3, dtype=torch.long), "expected integer labels"),
        ((torch.ones(2, 1), torch.tensor([-100, -100])), "ignored"),
        ((torch.ones(2, 1), torch.tensor([0, 2_000_000])), "most_classes"),
    ],
)
def test_refusals(batch: Any, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        advance([batch])
