"""What a training step has computed already is used where it is proved to fit, and nowhere else.

Two things: the gradient in `.grad` as the mean of the g_i, and the whole pass, watched. Both against a backward pass of
each example alone.
"""

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, build
from test_samples import DEFINED, EVERYTHING, assert_moments
from torch import Tensor, nn
from twins import example_gradients, total_loss
from zoo import ZOO, Checkpointed, N, Odd

from instruments import Probe, Refusal
from instruments.layout import Layout
from instruments.meter import Meter
from instruments.objective import as_objective
from instruments.samples import exploration, watched
from instruments.samples.exploration import Plan
from instruments.samples.moments import SampleMoments
from instruments.samples.watched import PassWatch

CROSS_ENTROPY = nn.CrossEntropyLoss()
Plans = dict[Any, Any]
Train = Callable[[nn.Module, Any, Any], Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    nothing_compiled()


def nothing_compiled() -> None:
    """As in a process in which no test before this one has compiled anything."""
    if (utils := sys.modules.get("torch._dynamo.utils")) is not None:
        utils.counters.clear()


def plainly(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    """The user's forward and backward pass; returns the loss."""
    value = total_loss(model, loss, batch) if isinstance(loss, nn.Module) else loss(model, batch).mean()
    value.backward()
    return value


def read(model: nn.Module, loss: Any, batch: Any, plans: Plans, seen: Any = None) -> tuple[SampleMoments, str | None]:
    """The moments, and the pass that they are said to come from."""
    meter = Meter()
    with Probe(model, as_objective(loss), [], [batch], plans=plans, watched=seen) as probe:
        return probe.samples.moments(meter, EVERYTHING), meter.provenance.get("pass")


def train(
    model: nn.Module, loss: Any, batch: Any, plans: Plans, user: Train = plainly
) -> tuple[SampleMoments, str | None]:
    """One step that is watched, by a user's pass of any kind, and what is read after it."""
    watch = PassWatch(model, plans.setdefault("graphs", {}), nullcontext)
    watch.arm(Layout.of(model))
    model.zero_grad()
    value = user(model, loss, batch)
    return read(model, loss, batch, plans, watch.take(value))


def known(model: nn.Module, loss: Any, batch: Any) -> Plans:
    """Plans after a first reading."""
    plans: Plans = {}
    read(model, loss, batch, plans)
    return plans


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))


def of_odd(odd: Odd) -> tuple[nn.Module, Any]:
    x = odd.inputs()
    return odd.model().double(), (x.double() if x.is_floating_point() else x, torch.randint(3, (N,)))


# .grad as the mean


@pytest.mark.parametrize("odd", ZOO, ids=lambda odd: odd.name)
def test_moments_round_the_gradient_of_training_are_those_of_single_examples(odd: Odd) -> None:
    model, batch = of_odd(odd)
    plans = known(model, CROSS_ENTROPY, batch)
    plainly(model, CROSS_ENTROPY, batch)
    for _ in range(2):
        assert_moments(read(model, CROSS_ENTROPY, batch, plans)[0], example_gradients(model, CROSS_ENTROPY, batch))


def test_the_pass_stops_early_and_leaves_the_gradients_of_parameters_out() -> None:
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    plainly(model, CROSS_ENTROPY, batch)
    reached = []
    handles = [p.register_hook(lambda g: reached.append(1)) for p in model.parameters()]
    moments, _ = read(model, CROSS_ENTROPY, batch, plans)
    assert not reached
    for handle in handles:
        handle.remove()
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))
    assert moments.mean[0].data_ptr() == model[0].weight.grad.data_ptr()


def masked(g: Tensor) -> Tensor:
    """A projection: its product with the true gradient is its own square."""
    return g * (torch.arange(g.numel()).view(g.shape) % 3 > 0)


def centred(g: Tensor) -> Tensor:
    return g - g.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    "change",
    [lambda g: 0.5 * g, lambda g: g + 0.01 * torch.randn_like(g), masked, centred, lambda g: g.clamp(-0.01, 0.01),
     torch.zeros_like, lambda g: g.flip(0)],
    ids=["scaled", "noisy", "masked", "centred", "clipped", "zero", "turned"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding", "norm"])
def test_a_gradient_that_was_changed_is_not_taken_for_the_mean(kind: str, change: Callable[[Tensor], Tensor]) -> None:
    """One parameter of one layer of each kind is enough."""
    if kind == "embedding":
        model: nn.Module = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)).double()
        batch: Any = (torch.randint(7, (N, 5)), torch.randint(3, (N,)))
    elif kind == "convolution":
        model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)).double()
        batch = (torch.randn(N, 2, 5, dtype=torch.float64), torch.randint(3, (N,)))
    else:
        first = nn.LayerNorm(4) if kind == "norm" else nn.Linear(4, 4)
        model, batch = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3)).double(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    for watch in (False, True):

        def user(model: nn.Module, loss: Any, batch: Any) -> Tensor:
            value = plainly(model, loss, batch)
            weight = next(model.parameters())
            weight.grad = change(weight.grad).contiguous()
            return value

        if watch:
            moments, _ = train(model, CROSS_ENTROPY, batch, plans, user)
        else:
            model.zero_grad()
            user(model, CROSS_ENTROPY, batch)
            moments, _ = read(model, CROSS_ENTROPY, batch, plans)
        assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))


def test_a_gradient_that_overflowed_once_is_tried_again() -> None:
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    plainly(model, CROSS_ENTROPY, batch)
    kept = model[0].weight.grad
    model[0].weight.grad = kept * torch.inf
    read(model, CROSS_ENTROPY, batch, plans)
    model[0].weight.grad = kept
    assert read(model, CROSS_ENTROPY, batch, plans)[0].mean[0].data_ptr() == kept.data_ptr()


# The pass, watched


def watched_right(model: nn.Module, loss: Any, batch: Any) -> str | None:
    plans, said = known(model, loss, batch), None
    for _ in range(2):
        moments, said = train(model, loss, batch, plans)
        assert_moments(moments, example_gradients(model, loss, batch))
    return said


SEEN = {
    "vision_transformer", "sequence_first", "bag_mean", "bag_sum", "heads", "left_matrix", "residual_group_norm",
    "frames", "rms_norm", "conv_1d", "conv_2d", "conv_3d",
}  # fmt: skip
"""Models of the zoo whose pass can be watched: every parameter is used once and has a rule."""


@pytest.mark.parametrize("odd", ZOO, ids=lambda odd: odd.name)
def test_a_watched_pass_gives_the_moments_of_single_examples(odd: Odd) -> None:
    model, batch = of_odd(odd)
    assert (watched_right(model, CROSS_ENTROPY, batch) is not None) == (odd.name in SEEN)


@pytest.mark.parametrize("case", DEFINED, ids=lambda case: case.name)
def test_a_watched_pass_of_every_loss(case: Case) -> None:
    built = build(case)
    said = watched_right(built.model, built.loss, built.batch)
    if case.name.startswith("mlp"):
        assert said == "of the training itself"


def test_nothing_of_the_model_is_run_again() -> None:
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    moments, _ = train(model, CROSS_ENTROPY, batch, plans)
    assert len(calls) == 1
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))


def twice(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    loss(model(batch[0]), batch[1])
    return plainly(model, loss, batch)


def both(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    value = (loss(model(batch[0]), batch[1]) + loss(model(batch[0] + 1), batch[1])) / 2
    value.backward()
    return value


def penalised(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    value = loss(model(batch[0]), batch[1]) + 0.1 * sum(p.square().sum() for p in model.parameters())
    value.backward()
    return value


def with_inner(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    """A loss on what a layer inside gave, beside that on the output."""
    inner = []
    handle = model[1].register_forward_hook(lambda module, args, output: inner.append(output))
    value = loss(model(batch[0]), batch[1]) + inner[0].square().mean()
    handle.remove()
    value.backward()
    return value


def accumulated(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    value = loss(model(batch[0]), batch[1])
    value.backward(retain_graph=True)
    value.backward()
    return value


def to_be_differentiated(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    value = loss(model(batch[0]), batch[1])
    value.backward(create_graph=True)
    return value


def another_loss(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    value = nn.CrossEntropyLoss(label_smoothing=0.2)(model(batch[0]), batch[1])
    value.backward()
    return value


def no_tensor(model: nn.Module, loss: Any, batch: Any) -> Any:
    return plainly(model, loss, batch).item()


def detached(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    return plainly(model, loss, batch).detach()


def offloaded(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return plainly(model, loss, batch)


def by_grad(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    """Of one layer only: the other's gradient never comes by."""
    value = loss(model(batch[0]), batch[1])
    value.backward(inputs=list(model[2].parameters()))
    return value


OTHERS = (
    both, penalised, with_inner, accumulated, another_loss, no_tensor, detached, offloaded, by_grad, twice,
)  # fmt: skip


@pytest.mark.parametrize("user", OTHERS, ids=lambda user: user.__name__)
def test_a_pass_that_is_not_that_of_the_loss_is_not_used(user: Train) -> None:
    """What is read is then of the loss and the batch that were given, by a pass of its own."""
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    moments, said = train(model, CROSS_ENTROPY, batch, plans, user)
    assert said is None
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))
    moments, said = train(model, CROSS_ENTROPY, batch, plans)  # and the next one is watched again
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))
    model.zero_grad()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_pass_that_is_to_be_differentiated_itself() -> None:
    model, batch = mlp(), rows()
    moments, _ = train(model, CROSS_ENTROPY, batch, known(model, CROSS_ENTROPY, batch), to_be_differentiated)
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))
    model.zero_grad()


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()


@pytest.mark.parametrize(
    "make", [dropout, lambda: Checkpointed(reentrant=False).double()], ids=["random", "checkpoint"]
)
def test_models_that_are_never_watched(make: Callable[[], nn.Module]) -> None:
    """Other masks, and saved tensors whose look-up runs the forward again."""
    model, batch = make(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    assert not any(key[0] == "output" for key in plans["graphs"])
    assert train(model, CROSS_ENTROPY, batch, plans)[1] is None


@pytest.mark.parametrize("place", ["factor", "find_uses"])
def test_what_goes_wrong_while_watching_does_not_reach_the_user(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    plainly(model, CROSS_ENTROPY, batch)
    expected = [p.grad.clone() for p in model.parameters()]

    def broken(*args: Any) -> Any:
        raise KeyError("broken on purpose")

    monkeypatch.setattr(watched, place, broken)
    moments, said = train(model, CROSS_ENTROPY, batch, plans)
    assert said is None
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_more_than_may_be_held_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    monkeypatch.setattr(watched, "KEPT_BYTES", 100)
    assert train(model, CROSS_ENTROPY, batch, plans)[1] is None


def test_a_wrong_factor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof against `.grad` does not trust what was watched."""
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    right = watched.factor

    def wrong(use: Any, axis: Any, delta: Tensor) -> Any:
        return right(use, axis, delta * 1.001)

    monkeypatch.setattr(watched, "factor", wrong)
    moments, said = train(model, CROSS_ENTROPY, batch, plans)
    assert said is None
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))


def test_nothing_is_left_of_a_pass() -> None:
    """No hook on modules anywhere, and no graph that holds itself through its hooks; taken, skipped or given up."""
    model, batch = mlp(), rows()
    plans, hooks = known(model, CROSS_ENTROPY, batch), nn.modules.module._global_forward_hooks
    watch = PassWatch(model, plans["graphs"], nullcontext)
    before = len(hooks)
    gc.collect()
    gc.disable()
    try:
        for end in ("taken", "disarmed", "armed again"):
            watch.arm(Layout.of(model))
            assert len(hooks) == before + 1
            output = model(batch[0])
            gone = weakref.ref(output)
            loss = F.cross_entropy(output, batch[1])
            loss.backward()
            if end == "taken":
                assert watch.take(loss) is not None
            elif end == "disarmed":
                watch.disarm()
            else:
                watch.arm(Layout.of(model))
                watch.disarm()
            del output, loss
            assert gone() is None, end
            assert len(hooks) == before
    finally:
        gc.enable()


def test_evaluation_between_two_steps_is_no_pass() -> None:
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)

    def user(model: nn.Module, loss: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            model(batch[0])
        return plainly(model, loss, batch)

    assert train(model, CROSS_ENTROPY, batch, plans, user)[1] == "of the training itself"


def test_nobody_is_watched_once_something_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on all modules would have it compiled again."""
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    before = len(nn.modules.module._global_forward_hooks)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    watch = PassWatch(model, plans["graphs"], nullcontext)
    watch.arm(Layout.of(model))
    armed = len(nn.modules.module._global_forward_hooks)
    watch.disarm()
    torch._dynamo.reset()
    nothing_compiled()
    assert armed == before


def test_the_early_stop_reaches_all_uses_of_a_branching_graph() -> None:
    """Uses below one another, beside one another, and at the very end."""
    model, batch = of_odd(next(odd for odd in ZOO if odd.name == "residual_group_norm"))
    plans = known(model, CROSS_ENTROPY, batch)
    (plan,) = [plan for key, plan in plans["graphs"].items() if key[0] != "output"]
    assert 0 < len(plan.deepest) < len(plan.axes)
    assert isinstance(plan, Plan)


def test_another_batch_norm_mode_in_the_same_graph_is_refused() -> None:
    """Without parameters of its own nothing but its mode tells."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)).double().eval()
    batch = rows()
    plans = known(model, CROSS_ENTROPY, batch)
    assert train(model, CROSS_ENTROPY, batch, plans)[1] is not None
    model.train()
    with pytest.raises(Refusal, match="mixes the examples"):
        train(model, CROSS_ENTROPY, batch, plans)


def test_a_loss_that_begins_to_couple_examples_is_refused() -> None:
    coupled = False

    def losses(call: Any, batch: Any) -> Tensor:
        each = F.cross_entropy(call(batch[0]), batch[1], reduction="none")
        return each * each.softmax(0) * len(each) if coupled else each

    model, batch = mlp(), rows()
    plans = known(model, losses, batch)
    assert train(model, losses, batch, plans)[1] is not None
    coupled = True
    with pytest.raises(Refusal, match="interact"):
        train(model, losses, batch, plans)


def clamped(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    """The output is made a picture after the backward pass, in place."""
    output = model(batch[0])
    value = loss(output, batch[1])
    value.backward()
    output.detach().clamp_(0, 0.1)
    return value


def past_the_counter(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    output = model(batch[0])
    value = loss(output, batch[1])
    value.backward()
    output.data.clamp_(0, 0.1)
    return value


@pytest.mark.parametrize("user", [clamped, past_the_counter])
def test_an_output_that_is_written_to_is_not_used(user: Train) -> None:
    """The gradient of a loss that is linear does not tell."""
    model, loss = mlp(), nn.L1Loss()
    batch = (rows()[0], torch.full((N, 3), 5.0, dtype=torch.float64))
    plans = known(model, loss, batch)
    moments, said = train(model, loss, batch, plans, user)
    assert said is None
    assert_moments(moments, example_gradients(model, loss, batch))


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.aux = nn.Linear(4, 6), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        out, self.aux = self.inner(x).chunk(2, 1)
        return out


def with_sibling(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    value = loss(model(batch[0]), batch[1]) + model.aux.square().mean()
    value.backward()
    return value


def test_a_sibling_of_the_output_in_the_loss() -> None:
    model, batch = Siblings().double(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    assert train(model, CROSS_ENTROPY, batch, plans)[1] is not None
    assert train(model, CROSS_ENTROPY, batch, plans, with_sibling)[1] is None


def test_other_inputs_than_those_trained_are_read_as_they_are_given() -> None:
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)

    def user(model: nn.Module, loss: Any, batch: Any) -> Tensor:
        return plainly(model, loss, (batch[0].flip(0), batch[1]))

    moments, said = train(model, CROSS_ENTROPY, batch, plans, user)
    assert said is None
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))
    equal = (batch[0].clone(), batch[1])

    def copied(model: nn.Module, loss: Any, batch: Any) -> Tensor:
        return plainly(model, loss, equal)

    assert train(model, CROSS_ENTROPY, batch, plans, copied)[1] is not None


def test_a_loss_that_asks_more_of_the_call_makes_a_pass_of_its_own() -> None:
    def losses(call: Any, batch: Any) -> Tensor:
        assert call.training
        return F.cross_entropy(call(batch[0]), batch[1], reduction="none")

    model, batch = mlp(), rows()
    plans = known(model, losses, batch)
    moments, said = train(model, losses, batch, plans)
    assert said is None
    assert_moments(moments, example_gradients(model, CROSS_ENTROPY, batch))


def test_a_parameter_frozen_after_the_backward_pass() -> None:
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)

    def user(model: nn.Module, loss: Any, batch: Any) -> Tensor:
        value = plainly(model, loss, batch)
        model[0].weight.requires_grad_(False)
        return value

    moments, said = train(model, CROSS_ENTROPY, batch, plans, user)
    assert said is None
    assert moments.norms_sq_NL.shape == (N, 3)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_what_is_compiled_while_a_pass_is_waited_for_sees_no_hook(fullgraph: bool) -> None:
    model, batch = mlp(), rows()
    plans = known(model, CROSS_ENTROPY, batch)
    torch._dynamo.reset()
    watch = PassWatch(model, plans["graphs"], nullcontext)
    for _ in range(3):
        watch.arm(Layout.of(model))
        compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
        CROSS_ENTROPY(compiled(batch[0]), batch[1]).backward()
        watch.disarm()
    found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    nothing_compiled()
    assert found == 1
    assert watch._unhook not in watched._compilation_starts()


def test_what_is_traced_while_a_pass_is_waited_for() -> None:
    model, batch = mlp(), rows()
    watch = PassWatch(model, known(model, CROSS_ENTROPY, batch)["graphs"], nullcontext)
    watch.arm(Layout.of(model))
    traced = torch.jit.trace(model, batch[0])
    watch.disarm()
    assert torch.equal(traced(batch[0]), model(batch[0]))


def test_plans_of_graphs_of_every_size_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploration, "MOST_PLANS", 6)
    model, plans = mlp(), dict[Any, Any]()
    x, y = rows()
    for n in (*range(2, N + 1), 3, 2):
        batch = (x[:n], y[:n])
        assert_moments(read(model, CROSS_ENTROPY, batch, plans)[0], example_gradients(model, CROSS_ENTROPY, batch))
    assert len(plans["graphs"]) <= 6
