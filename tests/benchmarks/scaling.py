"""What a tracked curvature reading costs from ten thousand to a hundred million parameters, in time and in memory.

    python tests/benchmarks/scaling.py [--most 1e7] [--readings 16] [--every 10] [--batch 32] [--seconds 60] [--json]

Networks 64-w-w-w-10 on scikit-learn digits under Adam; w makes the size. One batch is both trained and read on: 512
examples up to a million parameters, fewer beyond unless --batch says how many.

Three kinds of reading: `cold`, from no memory; `warm`, which goes on from the last one, `every` steps before;
`audited`, a warm one that was checked by a second iteration from a fresh start (early and restless training is audited
often). Cold and warm are read at the same steps. The first readings of a run, which also look at the model once, give
the memory and are not counted. A size gets `readings` moments, or as many as begin within `seconds`.

Unit g: one gradient of the mean loss on that batch, measured beside the readings; CPU seconds of one thread, or, where
torch has CUDA, seconds on the GPU. `counted` is what the meter says, in g: gradients and products at their price. The
difference to `cost` is work on vectors of the size of the model, which large models with few examples feel, and a fixed
time a reading, which small ones do. `peak` is the most that was allocated at a time beyond what stood before, over the
bytes of the parameters; parameters, gradients and Adam's state are four more. A size that would not fit ends the run.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gradient_cost import peak_bytes
from models import Batch, digits
from torch import nn

from cockpit_bench.tables import text_table
from instruments import Instrument, Probe, View
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.curvature.sharpness import Sharpness
from instruments.held import HeldBatches
from instruments.instrument import State
from instruments.objective import as_objective
from instruments.operators.hessian import KEPT_PRODUCT

LOSS = nn.CrossEntropyLoss()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (1e4, 1e5, 1e6, 1e7, 1e8)
READ: dict[str, Instrument] = {"sharpness": Sharpness(), "rho": PreconditionedSharpness()}
FIRST_STEPS = 20
STANDING = 4  # parameters, gradients and Adam's two averages, in bytes of the parameters
GUESS = 80  # bytes of a reading in those of the parameters, before one was seen
SLOW = 5e6  # parameters from which on the profiler takes nothing beside a reading
T = TypeVar("T")
Row = tuple[float, float, float]  # cost in g, products, counted in g


def network(parameters: float) -> nn.Module:
    """Of nearly that many parameters: 2 w^2 + 77 w + 10."""
    torch.manual_seed(0)
    w = round((math.sqrt(77**2 + 8 * (parameters - 10)) - 77) / 4)
    layers = (nn.Linear(64, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 10))
    return nn.Sequential(nn.Flatten(), *layers).to(DEVICE)


def examples_for(parameters: float) -> int:
    """512 up to a million parameters, then a quarter for each factor of ten, at least 32."""
    return max(32, 512 >> 2 * max(0, round(math.log10(parameters)) - 6))


def seconds_of(call: Callable[[], T]) -> tuple[T, float]:
    if DEVICE.type == "cpu":
        begun = time.process_time()
        return call(), time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return result, time.perf_counter() - begun


def peak_of(call: Callable[[], Any]) -> int:
    """Most bytes allocated at a time beyond what stood before."""
    if DEVICE.type == "cpu":
        return peak_bytes(call)
    torch.cuda.reset_peak_memory_stats()
    standing = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - standing


def free_bytes() -> float:
    """Of the GPU, or what the kernel (Linux) would give; infinite where nobody says."""
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


class Training:
    """Stands after backward and before the optimizer's step, where readings are taken."""

    def __init__(self, parameters: float, examples: int) -> None:
        self.model = network(parameters)
        self.size = sum(p.numel() for p in self.model.parameters())
        width = self.model[1].out_features  # type: ignore[index]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3 * min(1.0, 256 / width))
        x, y = digits()(examples, torch.Generator().manual_seed(0))
        self.batch: Batch = (x.to(DEVICE), y.to(DEVICE))
        self.plans: dict[Any, Any] = {}
        self.steps = 0
        self.backward()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        LOSS(self.model(self.batch[0]), self.batch[1]).backward()

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step()
            self.backward()
            self.steps += 1

    def unit(self) -> float:
        """Seconds of one gradient; the median of three."""
        params, (x, y) = list(self.model.parameters()), self.batch
        times = [seconds_of(lambda: torch.autograd.grad(LOSS(self.model(x), y), params))[1] for _ in range(3)]
        return sorted(times)[1]

    def read(self, instrument: Instrument, state: State) -> tuple[State, float, float]:
        """The memory after the reading, its products and its price in g."""
        seen = (self.model, as_objective(LOSS), [self.optimizer], [self.batch])
        with Probe(*seen, step=self.steps, held=HeldBatches([self.batch]), plans=self.plans) as probe:
            view = View(probe, instrument.needs)
            _, state = instrument.advance(view, state)
        return state, view.meter.products, view.meter.gradients + KEPT_PRODUCT * view.meter.products


def measure(parameters: float, examples: int, readings: int, every: int, seconds: float) -> dict[str, Any]:
    begun, training = time.perf_counter(), Training(parameters, examples)
    training.advance(FIRST_STEPS)
    states: dict[str, State] = {}
    peaks: dict[str, int] = {}
    for name, instrument in READ.items():

        def first(name: str = name, instrument: Instrument = instrument) -> None:
            states[name], *_ = training.read(instrument, instrument.init())

        peaks[f"{name}, cold"] = peak_of(first)
    rows: dict[str, list[Row]] = {label: [] for label in peaks}
    units: list[float] = []
    while len(units) < readings and (not units or time.perf_counter() - begun < seconds):
        training.advance(every)
        units.append(training.unit())
        for name, instrument in READ.items():
            for start in (instrument.init(), states[name]):
                read = partial(training.read, instrument, start)
                found: list[tuple[tuple[State, float, float], float]] = []
                once = partial(timed, read, found)
                peak = peak_of(once) if training.size > SLOW else once()
                (kept, products, counted), spent = found[0]
                label = f"{name}, {kind(start, kept)}"
                rows.setdefault(label, []).append((spent / units[-1], products, counted))
                if label not in peaks:
                    peaks[label] = peak if peak is not None else peak_of(read)
            states[name] = kept
    whole = 4 * training.size
    return {
        "parameters": training.size,
        "examples": examples,
        "g_seconds": float(np.median(units)),
        "gradient_peak": peak_of(training.backward) / whole,
        "readings": {
            label: {**summary(seen), "peak_bytes": peaks[label], "peak": peaks[label] / whole}
            for label, seen in sorted(rows.items())
        },
    }


def timed(call: Callable[[], T], found: list[tuple[T, float]]) -> None:
    found.append(seconds_of(call))


def kind(start: State, kept: State) -> str:
    """Of a reading, by the memory before and after it: an audit sets back the count of readings since the last."""
    return "cold" if start["vector_D"] is None else "warm" if kept["since"] else "audited"


def summary(rows: list[Row]) -> dict[str, Any]:
    costs, products, counted = np.array(rows).T
    low, middle, high = np.quantile(costs, [0.25, 0.5, 0.75])
    return {
        "count": len(rows),
        "cost_g": middle,
        "cost_g_quartiles": [low, high],
        "products": float(np.median(products)),
        "products_range": [int(products.min()), int(products.max())],
        "counted_g": float(np.median(counted)),
    }


HEAD = (
    "parameters", "examples", "g", "reading", "count", "products", "cost in g", "quartiles", "counted", "peak",
    "peak MB",
)  # fmt: skip


def table(results: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [HEAD]
    for result in results:
        about = (f"{result['parameters']:,}", str(result["examples"]), f"{result['g_seconds'] * 1e3:.2f} ms")
        for label, s in result["readings"].items():
            low, high = s["cost_g_quartiles"]
            least, most = s["products_range"]
            rows.append(
                (
                    *about, label, str(s["count"]), f"{s['products']:g} ({least} to {most})", f"{s['cost_g']:.1f}",
                    f"{low:.1f} to {high:.1f}", f"{s['counted_g']:.1f}", f"{s['peak']:.1f}",
                    f"{s['peak_bytes'] / 1e6:.1f}",
                )
            )  # fmt: skip
            about = ("", "", "")
    return text_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=float, default=SIZES[-1], help="largest number of parameters (default 1e8)")
    parser.add_argument("--readings", type=int, default=16, help="moments at which is read (default 16)")
    parser.add_argument("--every", type=int, default=10, help="steps between readings (default 10)")
    parser.add_argument("--batch", type=int, help="examples, at all sizes (default: 512, fewer for large networks)")
    parser.add_argument("--seconds", type=float, default=60, help="no moment of a size begins later (default 60)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    multiple: float = GUESS
    for size in (s for s in SIZES if s <= arguments.most):
        needed, free = 4 * size * (STANDING + multiple), free_bytes()
        if needed > free:
            print(
                f"stopped before {size:.0e} parameters: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
                file=sys.stderr,
            )
            break
        result = measure(
            size, arguments.batch or examples_for(size), arguments.readings, arguments.every, arguments.seconds
        )
        multiple = max(s["peak"] for s in result["readings"].values())
        results.append(result)
    if arguments.json:
        print(json.dumps({"device": DEVICE.type, **vars(arguments), "sizes": results}, indent=2))
        return
    print(f"{DEVICE.type}, one thread; up to {arguments.readings} moments {arguments.every} steps apart")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
