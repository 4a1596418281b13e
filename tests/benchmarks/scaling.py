"""What a tracked curvature reading costs from ten thousand to a hundred million parameters, in time and in memory.

    python tests/benchmarks/scaling.py [--most 1e7] [--readings 12] [--every 10] [--batch 32] [--seconds 60] [--json]

Networks 64-w-w-w-10 on scikit-learn digits under Adam; w makes the size. One batch is both trained and read on: 512
examples up to a million parameters, fewer beyond unless --batch says how many.

Three kinds of reading: `cold`, from no memory; `warm`, which goes on from the last one, `every` steps before;
`audited`, a warm one that was checked by a second iteration from a fresh start (early and restless training is audited
often). Cold and warm are read at the same steps. What is looked at once a run is not in it. A size gets `readings`
moments, or as many as begin within `seconds`, the warm readings of the second one in any case.

Unit g: one gradient of the mean loss on that batch, measured beside the readings; CPU seconds of one thread, or, where
torch has CUDA, seconds on the GPU. `counted` is what the meter says, in g: gradients and products at their price. The
difference to `cost` is work on vectors of the size of the model, which large models with few examples feel, and a fixed
time a reading, which small ones do. `peak` is the most that was allocated at a time beyond what stood before, over the
bytes of the parameters, median and most of the readings of a kind; memory that was asked for and not yet written counts
(up to eight vectors of Lanczos). Parameters, gradients and Adam's state are four more. A size that would not fit in
memory ends the run.
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
Row = tuple[float, int, float, int]  # cost in g, products, counted in g, peak in bytes


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

    def probe(self) -> Probe:
        seen = (self.model, as_objective(LOSS), [self.optimizer], [self.batch])
        return Probe(*seen, step=self.steps, held=HeldBatches([self.batch]), plans=self.plans)

    def look(self) -> None:
        """What is looked at once a run: whether the model can be differentiated twice."""
        with self.probe() as probe:
            _ = View(probe, frozenset({"hessian"})).hessian

    def read(self, instrument: Instrument, state: State) -> tuple[State, int, float]:
        """The memory after the reading, its products and its price in g."""
        with self.probe() as probe:
            view = View(probe, instrument.needs)
            _, state = instrument.advance(view, state)
        return state, view.meter.products, view.meter.gradients + KEPT_PRODUCT * view.meter.products

    def row(self, instrument: Instrument, state: State, g: float) -> tuple[State, Row]:
        """A reading, timed, and its peak: by the same reading once more where the profiler would cost time."""
        found: list[tuple[tuple[State, int, float], float]] = []

        def timed() -> None:
            found.append(seconds_of(partial(self.read, instrument, state)))

        if self.size < SLOW:
            timed()
        peak = peak_of(timed)
        (kept, products, counted), seconds = found[0]
        return kept, (seconds / g, products, counted, peak)


def measure(parameters: float, examples: int, readings: int, every: int, seconds: float) -> dict[str, Any]:
    begun, training = time.perf_counter(), Training(parameters, examples)
    training.look()
    training.advance(FIRST_STEPS)
    states: dict[str, State] = {}
    rows: dict[str, list[Row]] = {}
    units: list[float] = []
    while len(units) < readings:
        late = time.perf_counter() - begun > seconds
        if late and len(units) > 1:
            break
        training.advance(every)
        units.append(training.unit())
        for name, instrument in READ.items():
            starts = [states[name]] if name in states else []
            if not late or not starts:
                starts.insert(0, instrument.init())
            for start in starts:
                kept, row = training.row(instrument, start, units[-1])
                rows.setdefault(f"{name}, {kind(start, kept)}", []).append(row)
            states[name] = kept
    whole = 4 * training.size
    return {
        "parameters": training.size,
        "examples": examples,
        "g_seconds": float(np.median(units)),
        "gradient_peak": peak_of(training.backward) / whole,
        "readings": {label: summary(rows[label], whole) for label in sorted(rows)},
    }


def kind(start: State, kept: State) -> str:
    """Of a reading, by the memory before and after it: an audit sets back the count of readings since the last."""
    return "cold" if start["vectors_kD"] is None else "warm" if kept["since"] else "audited"


def summary(rows: list[Row], bytes_of_parameters: int) -> dict[str, Any]:
    costs, products, counted, peaks = np.array(rows).T
    low, middle, high = np.quantile(costs, [0.25, 0.5, 0.75]).tolist()
    return {
        "count": len(rows),
        "cost_g": middle,
        "cost_g_quartiles": [low, high],
        "products": float(np.median(products)),
        "products_range": [int(products.min()), int(products.max())],
        "counted_g": float(np.median(counted)),
        "peak": float(np.median(peaks)) / bytes_of_parameters,
        "peak_most": float(peaks.max()) / bytes_of_parameters,
        "peak_bytes": float(np.median(peaks)),
    }


HEAD = (
    "parameters", "examples", "g", "reading", "count", "products", "cost in g", "quartiles", "counted", "peak",
    "most", "peak MB",
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
                    f"{low:.1f} to {high:.1f}", f"{s['counted_g']:.1f}", f"{s['peak']:.0f}", f"{s['peak_most']:.0f}",
                    f"{s['peak_bytes'] / 1e6:.1f}",
                )
            )  # fmt: skip
            about = ("", "", "")
    return text_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=float, default=SIZES[-1], help="largest number of parameters (default 1e8)")
    parser.add_argument("--readings", type=int, default=12, help="moments at which is read (default 12)")
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
                f"stopped before {size:.0e} parameters: about {needed / 1e9:.2g} GB needed, {free / 1e9:.2g} GB free",
                file=sys.stderr,
            )
            break
        result = measure(
            size, arguments.batch or examples_for(size), arguments.readings, arguments.every, arguments.seconds
        )
        multiple = max(s["peak_most"] for s in result["readings"].values())
        results.append(result)
    if arguments.json:
        print(json.dumps({"device": DEVICE.type, **vars(arguments), "sizes": results}, indent=2))
        return
    print(f"{DEVICE.type}, one thread; up to {arguments.readings} moments {arguments.every} steps apart")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
