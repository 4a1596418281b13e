"""The second moment that an optimizer keeps of the gradient, as it stands before it takes in the present one.

For an average v <- beta2 v + (1 - beta2) g^2 from zero, after t steps, v_hat = v / (1 - beta2^t) estimates E g^2. Every
optimizer below is brought to this form, whatever it names its state and however it corrects:

    Adam, AdamW, NAdam    exp_avg_sq / (1 - beta2^t); for AMSGrad max_exp_avg_sq in its place, as torch divides by it
    RAdam                 the same; eps is added before the correction, hence is eps / sqrt(1 - beta2^t) after it
    Adamax                (exp_inf - eps)^2: exp_inf is the largest discounted |g| + eps of the past
    RMSprop               square_avg / (1 - alpha^t), although torch divides by the root of square_avg alone
    Adadelta              square_avg / (1 - rho^t), with sqrt(eps), as eps stands under its root
    Adagrad               sum / t, the initial value of the sum included

The gradient is that which the second moment takes in, with coupled weight decay added. A v_hat of exactly zero means
that there never was one, or that its square underflows.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from instruments.layout import Layout
from instruments.parameter_state import ParameterState
from instruments.refusal import Refusal

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Moment:
    """`v_hat` estimates E g^2; `square` is the square of what the optimizer adds `eps` to before it divides by the sum
    (both in the shape of the parameter); `length` is over how many steps v_hat averages, (1 - beta2^t) / (1 - beta2):
    t at first, 1 / (1 - beta2) in the end."""

    v_hat: Tensor
    square: Tensor
    eps: float
    length: float


@dataclass(frozen=True)
class SecondMoment:
    """The moment of one parameter tensor after `steps` steps, with the gradient that it is about to take in (None where
    there is none), the place of the tensor in the layout and the number of its group."""

    place: int
    group_number: int
    steps: float
    moment: Moment
    grad: Tensor | None


Reader = Callable[[Settings, Mapping[str, Any], float], Moment]
"""(parameter group, state of the parameter with its tensors in full precision, steps taken) -> Moment."""

READERS: dict[type[optim.Optimizer], Reader] = {}


def second_moments(states: Sequence[ParameterState], layout: Layout) -> Iterator[SecondMoment]:
    """Of each parameter that has been stepped on, in the order of the layout, one tensor at a time.

    Parameters of an optimizer without a second moment are left out where another one has it (Muon beside AdamW). Raises
    Refusal where none has, or the update rule is not known.
    """
    kept = [(state, reader) for state in states if (reader := _reader_of(state.optimizer)) is not None]
    if not kept:
        raise Refusal(_without(states))
    place = {name: i for i, name in enumerate(layout.names)}
    for (state, reader), t in zip(kept, _steps_taken([state for state, _ in kept]), strict=True):
        if t == 0:
            continue
        if state.param.is_complex():
            raise Refusal("complex parameters have no second moment by coordinate here; readings are not supported.")
        full = {name: _full(value) for name, value in state.state.items() if isinstance(value, Tensor)}
        grad = None if state.grad is None else _taken_in(state)
        yield SecondMoment(place[state.name], state.group_number, t, reader(state.group, full, t), grad)


def per_layer(layout: Layout, values: Mapping[int, Tensor]) -> Tensor:
    """(L,): the values by place in the layout, NaN for tensors without one."""
    nan = torch.full((), float("nan"), device=layout.device)
    found = [values.get(i, nan) for i in range(len(layout.params))]
    return torch.stack([value.to(device=layout.device, dtype=layout.dtype) for value in found])


def _reader_of(optimizer: optim.Optimizer) -> Reader | None:
    """A subclass is read like its parent while it does not override `step`."""
    for cls in type(optimizer).__mro__:
        if cls in READERS:
            same = inspect.unwrap(type(optimizer).step) is inspect.unwrap(cls.step)
            return READERS[cls] if same else None
    return None


def _without(states: Sequence[ParameterState]) -> str:
    known = ", ".join(sorted(cls.__name__ for cls in READERS))
    names = " and ".join(sorted({type(state.optimizer).__name__ for state in states})) or "none that holds a parameter"
    return (
        f"expected an optimizer whose second moment is known ({known}), got {names}; "
        "read step/update_ratio or step/effective_learning_rate instead, which ask for no state of the optimizer."
    )


def _steps_taken(states: Sequence[ParameterState]) -> list[float]:
    """Steps by parameter, 0 before the first; those on a device by one transfer."""
    steps = [torch.as_tensor(s.state.get("step", 0.0), dtype=torch.float32) for s in states]
    device = next((step.device for step in steps if step.device.type != "cpu"), torch.device("cpu"))
    taken: list[float] = torch.stack([step.to(device) for step in steps]).tolist()
    return taken


def _full(value: Tensor) -> Tensor:
    return value.float() if value.dtype.itemsize < 4 else value


def _taken_in(state: ParameterState) -> Tensor:
    """The gradient with its coupled decay, dense and in full precision."""
    assert state.grad is not None
    grad = _full(state.grad if state.grad.layout is torch.strided else state.grad.to_dense())
    group = state.group
    decay = float(group.get("weight_decay", 0.0))
    if not decay or group.get("decoupled_weight_decay", False):
        return grad
    return (-grad if group.get("maximize") else grad) + decay * _full(state.param)


def _reads(*classes: type[optim.Optimizer]) -> Callable[[Reader], Reader]:
    def register(reader: Reader) -> Reader:
        READERS.update(dict.fromkeys(classes, reader))
        return reader

    return register


@_reads(optim.Adam, optim.AdamW, optim.NAdam)
def _adam(group: Settings, state: Mapping[str, Any], t: float) -> Moment:
    beta2 = float(group["betas"][1])
    correction = 1 - beta2**t
    v_hat = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"] / correction
    return Moment(v_hat, v_hat, group["eps"], correction / (1 - beta2))


@_reads(optim.RAdam)
def _radam(group: Settings, state: Mapping[str, Any], t: float) -> Moment:
    plain = _adam(group, state, t)
    return Moment(plain.v_hat, plain.square, plain.eps / (1 - float(group["betas"][1]) ** t) ** 0.5, plain.length)


@_reads(optim.Adamax)
def _adamax(group: Settings, state: Mapping[str, Any], t: float) -> Moment:
    beta2 = float(group["betas"][1])
    square = (state["exp_inf"] - group["eps"]).clamp(min=0).square()
    return Moment(square, square, group["eps"], (1 - beta2**t) / (1 - beta2))


@_reads(optim.RMSprop)
def _rmsprop(group: Settings, state: Mapping[str, Any], t: float) -> Moment:
    alpha = float(group["alpha"])
    v = used = state["square_avg"]
    if group["centered"]:
        used = (v - state["grad_avg"].square()).clamp(min=0)
    return Moment(v / (1 - alpha**t), used, group["eps"], (1 - alpha**t) / (1 - alpha))


@_reads(optim.Adadelta)
def _adadelta(group: Settings, state: Mapping[str, Any], t: float) -> Moment:
    rho, v = float(group["rho"]), state["square_avg"]
    return Moment(v / (1 - rho**t), v, group["eps"] ** 0.5, (1 - rho**t) / (1 - rho))


@_reads(optim.Adagrad)
def _adagrad(group: Settings, state: Mapping[str, Any], t: float) -> Moment:
    return Moment(state["sum"] / t, state["sum"], group["eps"], t)
