"""What a tracked curvature reading costs from ten thousand to a hundred million parameters, in time and in memory.

    python tests/benchmarks/scaling.py [--most 1e7] [--readings 4] [--every 10] [--batch 32] [--json]

Networks 64-w-w-w-10 on scikit-learn digits under Adam; w makes the size. One batch is both trained and read on: 512
examples up to a million parameters, fewer beyond unless --batch says how many. Warm readings go on from the last one,
`every` steps before; cold ones start at the same steps from no memory. What is done once a run is in neither: the
readings at the first moment are not counted.

Unit g: one gradient of the mean loss on that batch, measured beside the readings; CPU seconds of one thread, or, where
torch has CUDA, seconds on the GPU. `counted` is what the meter says, in g: gradients and products at their price. The
difference to `cost` is work on vectors of the size of the model, and a fixed time a reading, which small models feel.
`peak` is the most that was allocated at a time beyond what stood before, as a multiple of the parameters' bytes; the
parameters, their gradients and Adam's state are four more. A size that would not fit in memory ends the run.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
FIRST_STEPS = 10
STANDING = 4  # parameters, gradients and Adam's two averages, in bytes of the parameters
GUESS, MARGIN = 60, 1.5  # bytes of a reading in those of the parameters before one was seen, and the room for more
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


def seconds_of(call: Callable[[], Any]) -> tuple[Any, float]:
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
        return statistics.median(
            seconds_of(lambda: torch.autograd.grad(LOSS(self.model(x), y), params))[1] for _ in range(3)
        )

    def read(self, instrument: Instrument, state: State) -> tuple[State, float, float]:
        """The memory after the reading, its products and its price in g."""
        seen = (self.model, as_objective(LOSS), [self.optimizer], [self.batch])
        with Probe(*seen, step=self.steps, held=HeldBatches([self.batch]), plans=self.plans) as probe:
            view = View(probe, instrument.needs)
            _, state = instrument.advance(view, state)
        return state, view.meter.products, view.meter.gradients + KEPT_PRODUCT * view.meter.products


def measure(parameters: float, examples: int, readings: int, every: int) -> dict[str, Any]:
    training = Training(parameters, examples)
    training.advance(FIRST_STEPS)
    states = {name: training.read(instrument, instrument.init())[0] for name, instrument in READ.items()}
    before = dict(states)
    rows: dict[str, list[Row]] = {f"{name}, {start}": [] for name in READ for start in ("cold", "warm")}
    units = []
    for _ in range(readings):
        training.advance(every)
        units.append(g := training.unit())
        before = dict(states)
        for name, instrument in READ.items():
            for start, state in (("cold", instrument.init()), ("warm", states[name])):
                (kept, products, counted), seconds = seconds_of(lambda i=instrument, s=state: training.read(i, s))
                rows[f"{name}, {start}"].append((seconds / g, products, counted))
            states[name] = kept
    bytes_of_parameters = 4 * training.size
    found: dict[str, Any] = {}
    for name, instrument in READ.items():  # once more at the last moment, with the profiler, which takes time
        for start, state in (("cold", instrument.init()), ("warm", before[name])):
            label = f"{name}, {start}"
            peak = peak_of(lambda i=instrument, s=state: training.read(i, s))
            found[label] = {**summary(rows[label]), "peak_bytes": peak, "peak": peak / bytes_of_parameters}
    return {
        "parameters": training.size,
        "examples": examples,
        "g_seconds": statistics.median(units),
        "gradient_peak": peak_of(training.backward) / bytes_of_parameters,
        "readings": found,
    }


def summary(rows: list[Row]) -> dict[str, Any]:
    costs, products, counted = zip(*rows, strict=True)
    low, middle, high = statistics.quantiles(costs, n=4, method="inclusive")
    return {
        "cost_g": middle,
        "cost_g_quartiles": [low, high],
        "products": statistics.median(products),
        "products_range": [min(products), max(products)],
        "counted_g": statistics.median(counted),
    }


def table(results: list[dict[str, Any]]) -> list[str]:
    head = (
        "parameters",
        "examples",
        "g",
        "reading",
        "products",
        "cost in g",
        "quartiles",
        "counted",
        "peak",
        "peak MB",
    )
    rows = [head]
    for result in results:
        about = (f"{result['parameters']:,}", str(result["examples"]), f"{result['g_seconds'] * 1e3:.2f} ms")
        for label, s in result["readings"].items():
            low, high = s["cost_g_quartiles"]
            least, most = s["products_range"]
            rows.append(
                (
                    *about, label, f"{s['products']:g} ({least} to {most})", f"{s['cost_g']:.1f}",
                    f"{low:.1f} to {high:.1f}", f"{s['counted_g']:.1f}", f"{s['peak']:.1f}",
                    f"{s['peak_bytes'] / 1e6:.1f}",
                )
            )  # fmt: skip
            about = ("", "", "")
    return text_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=float, default=SIZES[-1], help="largest number of parameters (default 1e8)")
    parser.add_argument("--readings", type=int, default=4, help="moments at which is read (default 4, at least 2)")
    parser.add_argument("--every", type=int, default=10, help="steps between readings (default 10)")
    parser.add_argument("--batch", type=int, help="examples, at all sizes (default: 512, fewer for large networks)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    multiple: float = GUESS
    for size in (s for s in SIZES if s <= arguments.most):
        needed, free = 4 * size * (STANDING + multiple) * MARGIN, free_bytes()
        if needed > free:
            print(
                f"stopped before {size:.0e} parameters: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
                file=sys.stderr,
            )
            break
        result = measure(size, arguments.batch or examples_for(size), arguments.readings, arguments.every)
        multiple = max(s["peak"] for s in result["readings"].values())
        results.append(result)
    if arguments.json:
        print(json.dumps({"device": DEVICE.type, **vars(arguments), "sizes": results}, indent=2))
        return
    print(f"{DEVICE.type}, one thread; {arguments.readings} moments, {arguments.every} steps apart")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
