"""accumulate=k: k micro-batches are one step, one probe, one reading."""

from typing import Any

import pytest
import torch
from loop_cases import Case, Training, mlp, rows
from watching import events, readings, values, watch

K, STEPS = 3, 4
ACCUMULATED = Case("accumulated", mlp, accumulate=K)


def whole(step: int) -> Any:
    """The micro-batches of a step as one batch."""
    micro = [rows(step * K + i) for i in range(K)]
    return torch.cat([x for x, _ in micro]), torch.cat([y for _, y in micro])


def both() -> tuple[Any, Any]:
    """The same training in micro-batches and in whole batches, both observed."""
    found = []
    for case in (ACCUMULATED, Case("whole", mlp, batch=whole)):
        training = Training(case)
        cockpit = watch(training)
        training.run(STEPS, cockpit.observe)
        cockpit.close()
        found.append(cockpit)
    return found[0], found[1]


def test_micro_batches_read_as_the_whole_batch_does() -> None:
    parts, one = both()
    assert [r.step for r in readings(parts, "gradient/norm")] == list(range(STEPS))
    assert parts.step == STEPS
    for label, output in (
        ("batch/loss", "loss"),
        ("gradient/norm", "norm"),
        ("gradient/noise_scale", "sum_of_squared_norms"),
        ("gradient/noise_scale", "squared_norm_of_sum"),
        ("step/step_ratio", "change"),
    ):
        assert values(parts, label, output) == pytest.approx(values(one, label, output), rel=1e-4), (label, output)
    assert [r.provenance["examples"] for r in readings(parts, "gradient/noise_scale")] == [3 * 12] * STEPS


def test_all_micro_batches_are_held_for_curvature() -> None:
    parts, one = both()
    first = readings(parts, "curvature/sharpness")[0]
    assert first.provenance["examples"] == 3 * 12
    sharpness = [values(cockpit, "curvature/sharpness", "sharpness")[0] for cockpit in (parts, one)]
    assert sharpness[0] == pytest.approx(sharpness[1], rel=0.05)


def test_nothing_is_read_between_the_micro_batches() -> None:
    training = Training(ACCUMULATED)
    cockpit = watch(training)
    for micro in range(K):
        assert not cockpit.records
        cockpit.observe(*training.backward(0, micro))
    assert len(readings(cockpit, "gradient/norm")) == 1
    cockpit.close()


def test_losses_add_up_and_start_again_with_every_step() -> None:
    training = Training(ACCUMULATED)
    cockpit = watch(training)
    training.run(STEPS, cockpit.observe)
    steps = [training.losses[i : i + K] for i in range(0, STEPS * K, K)]
    assert values(cockpit, "batch/loss", "loss") == pytest.approx([sum(losses) for losses in steps])
    assert readings(cockpit, "batch/loss")[0].provenance["loss"] == "given"
    cockpit.close()


def test_without_a_loss_it_is_recomputed_on_all_micro_batches() -> None:
    training = Training(ACCUMULATED)
    cockpit = watch(training)
    training.run(1, lambda batch, loss: cockpit.observe(batch))
    assert values(cockpit, "batch/loss", "loss") == pytest.approx([sum(training.losses)])
    assert readings(cockpit, "batch/loss")[0].provenance["loss"] == "recomputed"
    cockpit.close()


def test_the_gradient_is_the_one_of_the_last_micro_batch() -> None:
    training = Training(ACCUMULATED)
    cockpit = watch(training)
    for micro in range(K):
        cockpit.observe(*training.backward(0, micro))
    norm = torch.stack([p.grad.norm() for p in training.model.parameters()]).norm()
    assert values(cockpit, "gradient/norm", "norm") == pytest.approx([norm.item()])
    assert not events(cockpit, "gradient_note")
    assert not events(cockpit, "gradient_mismatch")
    cockpit.close()


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_what_is_no_number_of_micro_batches(k: Any) -> None:
    with pytest.raises(ValueError, match=r"accumulate .* whole number >= 1, got"):
        watch(Training(ACCUMULATED), accumulate=k)
