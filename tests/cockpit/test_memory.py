"""What observation holds on to, and what a forward writes to while it is looked at."""

import gc
from collections.abc import Iterator

import pytest
import torch
from loop_cases import FEATURES, Case, N, Training, mlp, rows
from torch import Tensor, nn, optim
from watching import EVERYTHING, readings, watch

from cockpit_bench import batches
from cockpit_bench.testing.traces import differences, state_of

CURVATURE = {name: timed for name, timed in EVERYTHING.items() if name.startswith("curvature/")}


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Only reference counts free memory."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def living(*shapes: tuple[int, ...]) -> int:
    return sum(type(t) is Tensor and tuple(t.shape) in shapes for t in gc.get_objects())


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("names", [("gradient/norm",), ("gradient/noise_scale", "step/step_ratio"), tuple(CURVATURE)])
def test_steps_that_were_observed_are_let_go(names: tuple[str, ...]) -> None:
    """No more gradients (8, FEATURES) and batches (N, FEATURES) after six steps than after two."""
    training = Training(Case("mlp", mlp))
    chosen = {name: EVERYTHING[name] for name in names}
    cockpit = watch(training, panel=None, instruments=chosen, probe=batches(rows(99)))
    counts = []
    for step in range(6):
        cockpit.observe(*training.backward(step))
        training.take_step()
        counts.append(living((8, FEATURES), (N, FEATURES)))
    cockpit.close()
    assert {r.instrument for r in readings(cockpit, status="ok")} == set(names)
    assert counts[-1] == counts[1]


class Renormalised(nn.Module):
    """Every forward writes to its first parameter: rows longer than 1 are shortened."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embed(tokens).mean(1))


def tokens(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randint(7, (3, 1), generator=g), torch.randint(3, (3,), generator=g)


def test_rows_of_a_table_that_a_forward_shortens_are_shortened_by_the_users_alone() -> None:
    """Adam moves rows that are not in the batch; a forward of held batches must not shorten these for good."""
    case = Case("max norm", Renormalised, lambda model: [optim.Adam(model.parameters(), lr=0.2)], batch=tokens)
    plain, training = Training(case).run(8), Training(case)
    cockpit = watch(training, panel=None, instruments=CURVATURE)
    training.run(8, cockpit.observe)
    cockpit.close()
    assert len(readings(cockpit, "curvature/sharpness", "ok")) == 8
    ends = [state_of(t.model, t.optimizers) for t in (plain, training)]
    assert differences(*ends) == []
