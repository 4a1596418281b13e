"""Repeated batches and examples against a search through the bytes of everything seen."""

import math
import statistics
from typing import Any

import pytest
import torch
from cases import CASES, Case, build
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from instruments import Probe, Refusal, View
from instruments.batch.repeated import Repeated, _example_hashes, _mixed
from instruments.instrument import State
from instruments.objective import as_objective


def advance(batches: list[Any], step: int, state: State | None = None, instrument: Repeated | None = None) -> Any:
    instrument = instrument or Repeated()
    with Probe(nn.Linear(1, 1), as_objective(nn.MSELoss()), [], batches, step=step) as probe:
        return instrument.advance(View(probe, instrument.needs), state or instrument.init())


def run(steps: list[list[Any]], instrument: Repeated | None = None) -> list[dict[str, float]]:
    state, found = None, []
    for step, batches in enumerate(steps):
        values, state = advance(batches, step, state, instrument)
        found.append(values)
    return found


class ByBytes:
    """The same from the definition: every example ever seen is kept whole."""

    def __init__(self) -> None:
        self.examples: dict[bytes, int] = {}
        self.batches: dict[tuple[bytes, ...], int] = {}

    def read(self, batches: list[Any], step: int) -> dict[str, float]:
        rows = []
        for batch in batches:
            tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
            rows += [b"|".join(t[i].contiguous().numpy().tobytes() for t in tensors) for i in range(len(tensors[0]))]
        key = tuple(sorted(rows))
        gaps = [step - self.examples[row] for row in rows if row in self.examples]
        values = {
            "repeated": float(key in self.batches),
            "steps_since": step - self.batches[key] if key in self.batches else math.nan,
            "share": len(gaps) / len(rows),
            "example_gap": statistics.median(gaps) if gaps else math.nan,
            "duplicates": 1 - len(set(rows)) / len(rows),
        }
        self.examples |= dict.fromkeys(rows, step)
        self.batches[key] = step
        return values


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_batches_of_every_case(case: Case) -> None:
    first, second = build(case).batch, build(case, seed=1).batch
    values = run([[first], [second], [first]])
    assert [v["repeated"] for v in values] == [0, 0, 1]
    assert values[2]["steps_since"] == 2
    assert values[2]["share"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("width", [1, 3, 17])
def test_a_random_stream_against_its_bytes(dtype: torch.dtype, width: int) -> None:
    """Few different examples, so that all kinds of repetition occur."""
    generator = torch.Generator().manual_seed(width)
    pool = torch.randint(0, 2, (9, width), generator=generator).to(dtype)
    labels = torch.randint(0, 3, (9,), generator=generator)
    twin, state = ByBytes(), None
    for step in range(40):
        at = torch.randint(0, 9, (2, 2), generator=generator)
        batches = [(pool[i], labels[i]) for i in at]
        values, state = advance(batches, step, state)
        assert values == pytest.approx(twin.read(batches, step), nan_ok=True), step


def test_the_order_of_the_examples_does_not_matter_but_their_pairing_does() -> None:
    x, y = torch.randn(8, 3), torch.arange(8)
    turned = run([[(x, y)], [(x.flip(0), y.flip(0))], [(x, y.flip(0))]])
    assert [v["repeated"] for v in turned] == [0, 1, 0]
    assert turned[2]["share"] == 0.0


def test_epochs_without_replacement() -> None:
    x = torch.randn(64, 2)
    generator = torch.Generator().manual_seed(0)
    steps = [[x[i]] for _ in range(3) for i in torch.randperm(64, generator=generator).split(8)]
    values = run(steps)
    assert [v["share"] for v in values] == [0.0] * 8 + [1.0] * 16
    assert statistics.mean(v["example_gap"] for v in values[8:]) == pytest.approx(8, abs=1)
    assert not any(v["repeated"] or v["duplicates"] for v in values)


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    instrument = Repeated(batches=2, examples=12)
    batches = [[torch.randn(5, 3)] for _ in range(4)]
    state = None
    for step, batch in enumerate(batches):
        _, state = advance(batch, step, state, instrument)
        assert len(state["examples"]) <= 12
        assert len(state["batches"]) <= 2
    seen = {i: advance(batch, 4, state, instrument)[0] for i, batch in enumerate(batches)}
    assert [seen[i]["repeated"] for i in range(4)] == [0, 0, 1, 1]
    assert [seen[i]["share"] for i in range(4)] == [0.0, 2 / 5, 1.0, 1.0]


def test_hashes_of_similar_examples_differ() -> None:
    """Small whole numbers as floats have many equal bits; no two of 40,000 neighbours may meet."""
    grid = torch.cartesian_prod(*[torch.arange(200.0)] * 2)
    assert len(_example_hashes(grid).unique()) == 40_000
    shifted = torch.zeros(300, 300)
    shifted.fill_diagonal_(1.0)
    assert len(_example_hashes(shifted).unique()) == 300
    assert len(_example_hashes(torch.arange(40_000)).unique()) == 40_000
    bits = _example_hashes(torch.arange(10_000))[:, None] >> torch.arange(64) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / 100  # every bit is set half of the time


def test_mixing_is_that_of_splitmix64() -> None:
    def exact(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    numbers = [0, 1, -1, 2**62, -(2**63), 123456789, -987654321]
    assert [h % 2**64 for h in _mixed(torch.tensor(numbers)).tolist()] == [exact(z % 2**64) for z in numbers]


def test_large_batches_are_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 7)
    whole = _example_hashes(x)
    monkeypatch.setattr("instruments.batch.repeated.WORDS", 9)
    assert torch.equal(_example_hashes(x), whole)
    assert torch.equal(_example_hashes(x.t().contiguous().t()), whole)  # however it lies in memory


def test_a_batch_without_examples_of_its_own_is_one() -> None:
    ragged, other = [torch.ones(3), torch.ones(5)], [torch.ones(3), torch.zeros(5)]
    values = run([[ragged], [other], [ragged]])
    assert [v["repeated"] for v in values] == [0, 0, 1]
    assert all(math.isnan(v["share"]) for v in values)
    scalar = {"x": torch.ones(4, 2), "weight": torch.tensor(2.0)}
    assert [v["repeated"] for v in run([[scalar], [scalar]])] == [0, 1]


def test_what_was_remembered_is_not_written_to() -> None:
    x = torch.randn(4, 2)
    _, state = advance([x], 0)
    before = {name: t.clone() for name, t in state.items()}
    advance([x], 5, state)
    assert all(torch.equal(t, before[name]) for name, t in state.items())


def test_refusals() -> None:
    with pytest.raises(Refusal, match="saw none"):
        advance([["text", "text"]], 0)
    with pytest.raises(Refusal, match="sparse"):
        advance([torch.eye(3).to_sparse()], 0)
    with pytest.raises(ValueError, match="examples >= 1"):
        Repeated(examples=0)
