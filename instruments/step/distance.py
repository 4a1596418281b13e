"""How far the parameters have come from where the run began.

Shapes: L = trained parameter tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.instrument import Instrument, Output, State, Values
from instruments.layout import norms_of, norms_of_difference
from instruments.view import Need, View


@dataclass(frozen=True)
class Distance(Instrument):
    """|theta_t - theta_0|, Euclidean, over all trained parameters and for each parameter tensor.

    theta_0 are the parameters at the first reading of the run: 0 there, and the start of the run only where the cadence
    begins with step 0. A random walk grows as the square root of the steps, a steady drift in proportion to them, and a
    distance that no longer grows belongs to a run that has arrived (or to weight decay that holds it in place).
    `relative` well below 1 is what is called lazy training: the network stays near its linearization. A tensor that
    began at zero has the relative distance infinity, or NaN while it has not moved.

    Memory: a copy of every trained parameter, on its device and in its precision. It goes into the checkpoint, which
    grows by the size of the model, so that a resumed run measures from the same start. When the trained parameters
    themselves change (their names or shapes), the distance starts anew. The length of the path is not read: it would
    need the step at every step, or a second copy for the chords between readings.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "distance": Output("parameter", "distance from the parameters at the first reading of the run"),
        "relative": Output("1", "the distance over the length of those parameters"),
        "per_layer": Output("parameter", "the distance of each parameter tensor", "per-layer"),
        "relative_per_layer": Output("1", "the relative distance of each parameter tensor", "per-layer"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"parameters"})
    reference: ClassVar[str] = (
        "Hoffer, Hubara and Soudry 2017, Train longer, generalize better; "
        "relative: Chizat, Oyallon and Bach 2019, On lazy training in differentiable programming"
    )

    def price(self, view: View) -> float:
        return 0.05

    def init(self) -> State:
        return {"names": [], "start": [], "lengths": None}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        now, names = view.parameters, list(view.layout.names)
        if state["names"] != names or not _same_shapes(now, state["start"]):
            start = [p.clone() for p in now]
            state = {"names": names, "start": start}
        if state.get("lengths") is None:
            state = {**state, "lengths": norms_of(state["start"])}
        start = [p0.to(p) for p, p0 in zip(now, state["start"], strict=True)]
        moved_L, start_L = norms_of_difference(now, start), state["lengths"].to(now[0].device)
        distance = torch.linalg.vector_norm(moved_L)
        values: Values = {
            "distance": distance,
            "relative": distance / torch.linalg.vector_norm(start_L),
            "per_layer": moved_L,
            "relative_per_layer": moved_L / start_L,
        }
        return values, state


def _same_shapes(now: Sequence[Tensor], start: Sequence[Tensor]) -> bool:
    return [p.shape for p in now] == [p0.shape for p0 in start]
