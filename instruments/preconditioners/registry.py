"""Which function reads which optimizer, and what it returns."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from instruments.refusal import Refusal


@dataclass(frozen=True)
class Scale:
    """One parameter's D and coupled decay c, either of them one number or a tensor that broadcasts to the parameter.

    With a `basis`, D = Q diag(step_size) Q' where Q = Q_1 (x) Q_2 (x) ... has orthonormal columns: one matrix for each
    dimension of `step_size`, None for the identity. `step_size` is then a tensor with as many scalars as the parameter,
    in the shape that the basis works on: that of the parameter, or another if the optimizer merges dimensions. c stays
    in the coordinates of the parameter.

    `second_moment`, in the shape of `step_size`, is what p is the root of, this gradient included, where there is one:
    where it is zero no gradient has come yet, the coordinate does not move, and p would be nothing but eps.
    """

    step_size: Tensor | float
    decay: Tensor | float = 0.0
    basis: Sequence[Tensor | None] | None = None
    second_moment: Tensor | None = None


Settings = Mapping[str, Any]
Reader = Callable[[Settings, Mapping[str, Any], Tensor, Tensor], Scale]
"""(parameter group, state of the parameter or {}, parameter, its gradient) -> Scale."""

READERS: dict[type, Reader] = {}
SIGN = "its step is the sign of an average of gradients, not linear in them: no D makes rho = 1 its edge"
REFUSED: Mapping[str, str] = {
    "Muon": "it orthogonalises its momentum, which is not linear in the gradient: no D makes rho = 1 its edge",
    "Lion": SIGN,
    "SignSGD": SIGN,
    "Signum": SIGN,
    "Rprop": "it uses the sign of the gradient alone: no D makes rho = 1 its edge",
    "LBFGS": "its step comes from a history of gradients and a line search, not from a fixed D",
    "SparseAdam": "coordinates that a batch does not touch keep their state, so the filter differs step by step",
}
INSTEAD = "step/step_ratio (r, edge 1) and curvature/batch_sharpness are read whatever the optimizer"


def reads(*classes: type) -> Callable[[Reader], Reader]:
    """Register the reader of an optimizer class; a subclass is read by it while it does not override `step`."""

    def register(reader: Reader) -> Reader:
        for cls in classes:
            READERS[cls] = reader
        return reader

    return register


def reader_of(optimizer: Any) -> Reader:
    """The registered reader, or a Refusal: an unknown update rule is never guessed."""
    name, ancestors = type(optimizer).__name__, type(optimizer).__mro__
    for cls in ancestors:
        if cls in READERS:
            if inspect.unwrap(type(optimizer).step) is inspect.unwrap(cls.step):  # type: ignore[attr-defined]
                return READERS[cls]
            raise Refusal(
                f"{name} overrides the step of {cls.__name__}, so its preconditioner is unknown; register a reader for "
                f"it with instruments.preconditioners.reads. {INSTEAD}."
            )
    for cls in ancestors:
        if cls.__name__ in REFUSED:
            raise Refusal(f"preconditioned sharpness is not defined for {name}: {REFUSED[cls.__name__]}. {INSTEAD}.")
    known = ", ".join(sorted(cls.__name__ for cls in READERS))
    raise Refusal(
        f"no preconditioner reader for {name} (known: {known}); register one with instruments.preconditioners.reads. "
        f"{INSTEAD}."
    )


def edge_gain(beta: float) -> float:
    """F(-1) of an exponential moving average: (1 - beta) / (1 + beta)."""
    return (1 - float(beta)) / (1 + float(beta))


def average(old: Tensor | None, new: Tensor, beta: float) -> Tensor:
    """beta old + (1 - beta) new, from zero where there is no old one."""
    return (1 - beta) * new if old is None else beta * old + (1 - beta) * new
