"""At the first reading, and once more: is the loss that the cockpit was given the loss that is trained?"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_cases import Case, Training, case_named, mlp, rows
from refusals import expected_refusals
from torch import Tensor, nn
from watching import EVERYTHING, events, readings, values, watch

from cockpit_bench import Cockpit

PLAIN = Case("plain", mlp)


def observed(
    backward: Callable[[Training], Any], *, case: Case = PLAIN, steps: int = 1, **settings: Any
) -> tuple[Cockpit, dict[str, list[Any]]]:
    """A run whose gradients come from `backward`, and the events about them."""
    training = Training(case)
    cockpit = watch(training, **settings)
    for _ in range(steps):
        for _ in range(case.accumulate):
            cockpit.observe(backward(training))
        training.take_step()
    cockpit.close()
    names = ("gradient_mismatch", "gradient_note", "gradient_unchecked")
    return cockpit, {name: events(cockpit, name) for name in names if events(cockpit, name)}


def trained_on(loss: Callable[[nn.Module, Any], Tensor], batch: Any = None) -> Callable[[Training], Any]:
    """A backward of another loss than the cross entropy that the cockpit is given; `batch` is what it sees."""

    def backward(training: Training) -> Any:
        own = rows(0)
        loss(training.model, own).backward()
        return own if batch is None else batch

    return backward


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def with_decay(model: nn.Module, batch: Any) -> Tensor:
    return mean_loss(model, batch) + sum(p.square().sum() for p in model.parameters())


def clipped(clip: Callable[..., Any], limit: float) -> Callable[[Training], Any]:
    def backward(training: Training) -> Any:
        mean_loss(training.model, rows(0)).backward()
        clip(training.model.parameters(), limit)
        return rows(0)

    return backward


def micro_batches(*, divide: bool, sizes: tuple[int, ...]) -> Callable[[Training], Any]:
    turn = iter(range(len(sizes)))

    def backward(training: Training) -> Any:
        i = next(turn)
        batch = tuple(part[: sizes[i]] for part in rows(i))
        loss = mean_loss(training.model, batch)
        (loss / len(sizes) if divide else loss).backward()
        return batch

    return backward


def test_the_same_loss_needs_no_word() -> None:
    cockpit, said = observed(trained_on(mean_loss), steps=3)
    assert said == {}
    assert readings(cockpit, "curvature/sharpness", "ok")


@pytest.mark.parametrize(
    "backward",
    [
        trained_on(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1].flip(0))),
        trained_on(with_decay),
        trained_on(lambda model, batch: -mean_loss(model, batch)),
        trained_on(mean_loss, batch=rows(5)),
    ],
    ids=["other targets", "weight decay in the loss", "ascent", "another batch"],
)
def test_another_loss_or_batch_is_a_mismatch(backward: Any) -> None:
    _, said = observed(backward, steps=3)
    assert list(said) == ["gradient_mismatch"]
    (event,) = said["gradient_mismatch"]
    assert event.step == 0
    assert "the loss given is not the loss trained" in event.detail["reason"]
    assert event.detail["cosine"] < 0.999


@pytest.mark.parametrize(
    ("backward", "case", "word"),
    [
        (clipped(nn.utils.clip_grad_norm_, 1e-2), PLAIN, "clipped before observe"),
        (clipped(nn.utils.clip_grad_value_, 1e-2), PLAIN, "elements of .grad were clipped before observe"),
        (trained_on(lambda model, batch: 1024 * mean_loss(model, batch)), PLAIN, "is 1024 times.*loss scale"),
        (trained_on(lambda model, batch: 12 * mean_loss(model, batch)), PLAIN, "12 times.*summed loss"),
        (trained_on(mean_loss), Case("dropout", lambda: mlp(nn.Dropout(0.5))), "dropout"),
        (micro_batches(divide=False, sizes=(6, 6)), Case("", mlp, accumulate=2), "2 accumulated losses were added"),
        (micro_batches(divide=True, sizes=(12, 2)), Case("", mlp, accumulate=2), "^the micro-batches count alike"),
        (
            micro_batches(divide=False, sizes=(12, 2)),
            Case("", mlp, accumulate=2),
            "were added.*micro-batches count alike",
        ),
    ],
    ids=[
        "norm clip",
        "value clip",
        "scale",
        "sum",
        "dropout",
        "accumulated sum",
        "unequal micro-batches",
        "accumulated sum of unequal micro-batches",
    ],
)
def test_a_difference_that_is_explained(backward: Any, case: Case, word: str) -> None:
    _, said = observed(backward, case=case)
    assert list(said) == ["gradient_note"]
    (event,) = said["gradient_note"]
    assert re.search(word, event.detail["reason"])


@pytest.mark.parametrize(
    ("sizes", "model"),
    [((12, 2), mlp), ((12, 12), lambda: mlp(nn.Dropout(0.05)))],
    ids=["unequal micro-batches", "dropout"],
)
@pytest.mark.parametrize("divide", [False, True])
def test_losses_that_are_added_have_a_lower_edge(
    sizes: tuple[int, ...], model: Callable[[], nn.Module], divide: bool
) -> None:
    backward = micro_batches(divide=divide, sizes=sizes)
    cockpit, _ = observed(backward, case=Case("", model, accumulate=2))
    edge = (2 + 2 * 0.9) / 0.1  # of heavy ball
    assert values(cockpit, "curvature/sharpness", "edge") == pytest.approx([edge if divide else edge / 2])


@pytest.mark.parametrize(("others", "lr"), [(True, 0.1), (False, 1e-4)], ids=["other batches", "the same batch"])
def test_gradients_that_are_never_zeroed(others: bool, lr: float) -> None:
    """At the first step nothing is wrong yet."""
    training = Training(Case("plain", mlp, lambda model: [torch.optim.SGD(model.parameters(), lr=lr)]))
    cockpit = watch(training)
    for step in range(4):
        batch = rows(step if others else 0)
        mean_loss(training.model, batch).backward()
        cockpit.observe(batch)
        training.optimizers[0].step()
    cockpit.close()
    (event,) = events(cockpit, "gradient_mismatch")
    assert event.step == 1
    assert "zero_grad() is not called once a step" in event.detail["reason"]
    assert (event.detail["cosine"] > 0.999) != others
    assert not events(cockpit, "gradient_note")


def test_a_forward_that_carries_something_along_is_not_taken_for_gradients_left_over() -> None:
    """Spectral norm takes a step of its power iteration in each forward; at the first reading it has converged."""
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(normed(nn.Linear(64, 128)), nn.ReLU(), normed(nn.Linear(128, 10)))
    optimizer, x = torch.optim.Adam(model.parameters(), lr=1e-2), torch.randn(32, 64)
    batch = (x, (x @ torch.randn(64, 10)).argmax(1))
    how: dict[str, Any] = {"panel": None, "instruments": {"curvature/sharpness": 10}, "sinks": [], "budget": None}
    cockpit = Cockpit(model, optimizer, loss=nn.CrossEntropyLoss(), **how)
    for _ in range(11):
        mean_loss(model, batch).backward()
        cockpit.observe(batch)
        optimizer.step()
        optimizer.zero_grad()
    cockpit.close()
    assert not events(cockpit, "gradient_mismatch")
    (event,) = events(cockpit, "gradient_note")
    assert event.step == 10
    assert "carries something from pass to pass" in event.detail["reason"]


def test_what_is_clipped_only_later_is_noted() -> None:
    limits = iter([1e9, 1e-2, 1e-2])

    def backward(training: Training) -> Any:
        return clipped(nn.utils.clip_grad_norm_, next(limits))(training)

    _, said = observed(backward, steps=3)
    assert [(name, event.step) for name in said for event in said[name]] == [("gradient_note", 1)]


def test_autocast_is_not_taken_for_a_factor() -> None:
    def backward(training: Training) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mean_loss(training.model, rows(0))
        loss.backward()
        return rows(0)

    _, said = observed(backward)
    assert said == {}


@pytest.mark.parametrize(
    "name", ["torch generator", "numpy generator", "numpy state", "python generator", "global generators"]
)
def test_noise_of_any_source_is_explained(name: str) -> None:
    """Not only torch's own generator: the forward may draw from one that the model owns."""
    _, said = observed(trained_on(mean_loss), case=case_named(name))
    assert list(said) == ["gradient_note"]
    assert "random numbers" in said["gradient_note"][0].detail["reason"]


def test_a_loss_that_cannot_be_evaluated_is_unchecked_and_the_rest_is_read() -> None:
    def broken(call: Any, batch: Any) -> Tensor:
        raise KeyError("labels")

    cockpit, said = observed(trained_on(mean_loss), loss=broken)
    assert list(said) == ["gradient_unchecked"]
    assert "labels" in said["gradient_unchecked"][0].detail["reason"]
    assert len(values(cockpit, "gradient/norm", "norm")) == 1


def test_cheap_panels_are_not_checked() -> None:
    """The check costs a gradient; instruments that never run the model do not make the user pay for it."""
    _, said = observed(trained_on(with_decay), panel="light")
    assert said == {}


def test_processes_that_train_one_model_average_their_gradients(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("user_ddp.py"))]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    one, two = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    assert one["weights"] == two["weights"]
    for said in (one, two):
        ((name, reason),) = said["events"]
        assert (name, "averaged over 2 processes" in reason) == ("gradient_note", True)
        assert set(said["ok"]) == set(EVERYTHING) - expected_refusals(Training(PLAIN))
