"""Diagonals of the curvature on the held batches: computed for the first view that asks, billed to it, and shared."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from instruments.diagonals.backpack import Extension, backpack_diagonal
from instruments.diagonals.drawn import FORWARD, SQUARES, can_draw, drawn_diagonal
from instruments.diagonals.draws import Draws
from instruments.meter import Meter
from instruments.refusal import Refusal
from instruments.samples.problem import SampleProblem

if TYPE_CHECKING:
    from instruments.probe import Probe

BACKPACK, COLUMN = 4 / 3, 2 / 3
"""In g: its two forward passes and one backward pass, and what it carries back for one column."""
USUAL_COLUMNS = 10


class Diagonals:
    """Each is shared until the probe is closed. Out of memory: it is read on fewer held batches."""

    def __init__(self, probe: "Probe") -> None:
        self._probe: Probe = weakref.proxy(probe)

    def drawn(self, draws: int, meter: Meter) -> Draws:
        """From drawn targets, by the engine that the settings choose for gradients of single examples."""
        probe = self._probe

        def compute() -> Draws:
            return drawn_diagonal(
                self._problem(), probe.held.batches, seed=probe.step, draws=draws, engine=probe.settings.samples
            )

        return self._once(f"drawn diagonal {draws}", compute, meter, lambda: self.drawn_price(draws))

    def backpack(self, extension: Extension, draws: int, meter: Meter) -> Draws:
        """By BackPACK; only DiagGGNMC has draws."""
        probe = self._probe

        def compute() -> Draws:
            batches = probe.held.batches
            found, columns = backpack_diagonal(self._problem(), batches, extension, seed=probe.step, draws=draws)
            probe.plans[f"columns of {extension}"] = columns
            return found

        return self._once(f"{extension} {draws}", compute, meter, lambda: self.backpack_price(extension, draws))

    def drawable(self) -> bool:
        """Whether the distribution that the loss stands for is known."""
        return can_draw(self._probe.objective)

    def drawn_price(self, draws: int) -> float:
        """In g."""
        return FORWARD + draws * SQUARES

    def backpack_price(self, extension: Extension, draws: int) -> float:
        """In g; how many columns are carried back is known from the first reading on."""
        columns: int = self._probe.plans.get(f"columns of {extension}", USUAL_COLUMNS)
        return (draws if extension == "DiagGGNMC" else 1) * (BACKPACK + columns * COLUMN)

    def _problem(self) -> SampleProblem:
        probe = self._probe

        def pinned(*, differentiable: bool = True) -> AbstractContextManager[None]:
            return probe.running(held=True, differentiable=differentiable)

        probe.prepare()
        graphs = probe.plans.setdefault("graphs of drawn targets", {})
        return SampleProblem(probe.module, probe.layout, probe.objective, pinned, plans=graphs)

    def _once(self, name: str, compute: Callable[[], Draws], meter: Meter, price: Callable[[], float]) -> Draws:
        probe = self._probe

        def patiently() -> Draws:
            while True:
                try:
                    found = compute()
                    meter.gradients += price()
                    return found
                except torch.OutOfMemoryError as error:
                    if not probe.held.shrink():
                        raise Refusal(f"out of memory with a single probe batch: {error}") from error

        found: Draws = probe.once(name, patiently, meter, 0.0)
        meter.provenance.update(
            batch=probe.held.label, examples=probe.held.examples or "unknown", diagonal=found.engine
        )
        return found
