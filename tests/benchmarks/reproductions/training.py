"""The small problems of the reproductions, and a training loop that is watched by a cockpit.

Inputs are standard normal, the teacher is linear, and weights start with the variance of `network`; R11 takes what
`standardised` and `xavier` are for. The sources leave that open; with torch's smaller weights R02 and R03 miss.
docs/reproductions.md has what was tried.

Shapes: N = examples, C = classes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, optim

from cockpit_bench import Cockpit, Reading, batches
from instruments.curvature.sharpness import Sharpness

Batch = tuple[Tensor, Tensor]
INPUTS, CLASSES = 20, 5
ACTIVATIONS: Mapping[str, tuple[type[nn.Module], float]] = {"tanh": (nn.Tanh, 1.0), "ReLU": (nn.ReLU, 2.0)}


def teacher_data(n: int, noise: float, *, standardised: bool = False) -> Batch:
    """Normal inputs, labelled by a random linear teacher; a share `noise` of labels is drawn afresh (1: all random).

    `standardised` gives each input mean 0 and variance 1 in the sample, before it is labelled.
    """
    x = torch.randn(n, INPUTS)
    if standardised:
        x = (x - x.mean(0)) / x.std(0)
    labels_N = (x @ torch.randn(INPUTS, CLASSES)).argmax(1)
    drawn_N = torch.rand(n) < noise
    return x, torch.where(drawn_N, torch.randint(CLASSES, (n,)), labels_N)


def network(activation: str, width: int, *, xavier: bool = False) -> nn.Module:
    """20-width-width-5; weights normal with variance 1 / inputs of the layer, 2 / inputs for ReLU; biases zero.

    With `xavier` the variance is 2 / (inputs + outputs) for tanh, as usual there; ReLU keeps its own.
    """
    kind, gain = ACTIVATIONS[activation]
    model = nn.Sequential(nn.Linear(INPUTS, width), kind(), nn.Linear(width, width), kind(), nn.Linear(width, CLASSES))
    for layer in model:
        if isinstance(layer, nn.Linear):
            if xavier and activation == "tanh":
                nn.init.xavier_normal_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=(gain / layer.in_features) ** 0.5)
            nn.init.zeros_(layer.bias)
    return model


def half_squared_errors(call: Callable[[Tensor], Tensor], batch: Batch, *, scale: float = 1.0) -> Tensor:
    """1/2 |f(x) - scale onehot(y)|^2, one an example: summed over the outputs, not averaged."""
    outputs_NC = call(batch[0])
    return 0.5 * (outputs_NC - scale * nn.functional.one_hot(batch[1], outputs_NC.shape[1])).square().sum(1)


def cross_entropies(call: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(call(batch[0]), batch[1], reduction="none")


@dataclass(frozen=True)
class Plan:
    """How a run is trained: `batch_size` None is the full batch, else every epoch is shuffled and cut.

    `lr_at` is the learning rate of a step, None that of the optimizer. `instruments` are read at their cadences. A loss
    beyond `hopeless` times the first one ends the run: it has diverged.
    """

    steps: int
    batch_size: int | None = None
    lr_at: Callable[[int], float] | None = None
    instruments: Mapping[str, Any] = field(default_factory=dict)
    hopeless: float = 1e6

    def rows(self, n: int) -> Iterator[Tensor]:
        """One index of examples a step, without end."""
        size = self.batch_size or n
        while True:
            order_N = torch.randperm(n) if self.batch_size else torch.arange(n)
            yield from (order_N[start : start + size] for start in range(0, n, size))


def number(reading: Reading, output: str) -> float:
    """One output of a reading; one that failed raises, since nothing can be said without it."""
    value = reading.values.get(output)
    if reading.status != "ok" or not isinstance(value, int | float):
        raise RuntimeError(f"expected {output} of {reading.instrument}, got {value}; {reading.status} {reading.reason}")
    return float(value)


@dataclass
class Watched:
    """The loss of every step's batch, and what the instruments read: name.output -> (steps, values)."""

    losses: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    def series(self, label: str, output: str) -> tuple[Tensor, Tensor]:
        """Steps and values of one output."""
        mine = [reading for reading in self.readings if reading.instrument == label]
        values = torch.tensor([number(reading, output) for reading in mine], dtype=torch.float64)
        return torch.tensor([reading.step for reading in mine]), values

    def keep(self, record: Any) -> None:
        if isinstance(record, Reading):
            self.readings.append(record)


def watch(model: nn.Module, optimizer: optim.Optimizer, losses: Any, data: Batch, plan: Plan) -> Watched:
    """Train and read; curvature is that of the whole data set, batch sharpness that of the step's batch."""
    run, rows = Watched(), plan.rows(len(data[0]))
    how: dict[str, Any] = {"panel": None, "probe": batches(data), "budget": None, "strict": True, "sinks": [run.keep]}
    with Cockpit(model, optimizer, loss=losses, instruments=plan.instruments, **how) as cockpit:
        for step in range(plan.steps):
            if plan.lr_at is not None:
                for group in optimizer.param_groups:
                    group["lr"] = plan.lr_at(step)
            index = next(rows)
            batch = data[0][index], data[1][index]
            loss = losses(model, batch).mean()
            loss.backward()
            run.losses.append(float(loss.detach()))
            if not run.losses[-1] < plan.hopeless * run.losses[0]:
                break
            cockpit.observe(batch, loss)
            optimizer.step()
            optimizer.zero_grad()
    return run


def sharpness_now(model: nn.Module, losses: Any, data: Batch) -> float:
    """lambda_1 of the loss on all data at the present parameters."""
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    with Cockpit(model, optimizer, loss=losses, panel=None, sinks=[], strict=True) as cockpit:
        return number(cockpit.read(Sharpness(tol=1e-3), data), "sharpness")
