"""What per-example gradient readings cost: in gradients, in memory, and at every step beside Cockpit 1.0.2.

    python tests/benchmarks/gradient_cost.py [reading memory economy] [--problems mlp cnn transformer] [--json]

reading: one probe that reads noise scale, signal-to-noise, gradient tests and coherence together, its own forward and
backward included, by each engine; the gradient of the batch stands in `.grad`, as at observe(). Unit g: one forward and
backward of the mean loss on the same batch, measured beside it. "by hand" is the least that code for this one network
needs. memory: peak of that reading, from the profiler's
allocations, against 1.5 times the peak of a gradient plus two copies of the parameters. economy: a step of SGD observed
at every step, over a plain one; Cockpit with its configuration "economy" beside it, where it is installed:

    pip install --no-deps --target DIR cockpit-for-pytorch json-tricks pandas seaborn palettable python-dateutil six
    PYTHONPATH=DIR python tests/benchmarks/gradient_cost.py economy

One thread, CPU time of the process, what is compared takes turns; quartiles stand behind medians. Page faults come and
go with the heap, up to a third of a gradient: with MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ at 1000000000
(glibc) there are none.
"""

import argparse
import copy
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from by_hand import reading_by_hand
from models import PROBLEMS, Batch, Moment, Problem, trajectory
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cockpit_bench import Cockpit
from instruments import Instrument, Probe, View
from instruments.gradient.coherence import Coherence
from instruments.gradient.gradient_tests import GradientTests
from instruments.gradient.noise_scale import NoiseScale
from instruments.gradient.signal_to_noise import SignalToNoise
from instruments.objective import as_objective
from instruments.probe_settings import ProbeSettings
from instruments.refusal import Refusal

LOSS = nn.CrossEntropyLoss()
READ: Sequence[Instrument] = (NoiseScale(), SignalToNoise(), GradientTests(), Coherence())
NEEDS = frozenset[str]().union(*(instrument.needs for instrument in READ))
ENGINES = ("fused", "torch.func", "backpack")
ECONOMY = (
    "batch/loss", "gradient/norm", "gradient/histogram", "gradient/gradient_tests", "step/alpha", "step/distance",
    "step/update_ratio",
)  # fmt: skip
MOST_G = {"mlp": 2.0, "cnn": 2.2, "transformer": 2.2}
MOST_ECONOMY = {"mlp": 3.5, "cnn": 3.0}
MOST_PEAK, COPIES = 1.5, 2
BLOCK = 10  # steps of one kind in a row
Call = Callable[[], object]


def cpu_seconds(call: Call) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def ratios(calls: dict[str, Call], unit: str, rounds: int, *, warm: bool) -> dict[str, dict[str, float]]:
    """Cost of each call in units of the one named `unit`, by rounds in which all take their turn.

    `warm`: each is made twice, the second is measured, so that none pays for the caches that its neighbour emptied.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 2):
        for name, call in calls.items():
            if warm:
                call()
            spent = cpu_seconds(call)
            if index >= 2:  # the first rounds look at the graph and fill the memory pools
                seconds[name].append(spent)
    found = {}
    for name, mine in seconds.items():
        quarters = statistics.quantiles([a / b for a, b in zip(mine, seconds[unit], strict=True)], n=4)
        milliseconds = statistics.median(mine) * 1e3
        found[name] = {"ratio": quarters[1], "low": quarters[0], "high": quarters[2], "ms": milliseconds}
    return found


def gradient(moment: Moment) -> None:
    x, y = moment.batch
    torch.autograd.grad(LOSS(moment.model(x), y), list(moment.model.parameters()))


class Reading:
    """All of READ on one batch, through one probe, with what is remembered of the model from reading to reading."""

    def __init__(self, moment: Moment, engine: Any) -> None:
        self.moment, self.engine, self.plans = moment, engine, dict[Any, Any]()
        self.states = [instrument.init() for instrument in READ]
        moment.optimizer.zero_grad()  # as at observe(): what training has computed of this batch stands in .grad
        x, y = moment.batch
        LOSS(moment.model(x), y).backward()

    def __call__(self) -> None:
        moment = self.moment
        seen = (moment.model, as_objective(LOSS), [moment.optimizer], [moment.batch])
        with Probe(*seen, settings=ProbeSettings(samples=self.engine), expected=NEEDS, plans=self.plans) as probe:
            for index, instrument in enumerate(READ):
                _, self.states[index] = instrument.advance(View(probe, instrument.needs), self.states[index])


def reading_cost(problem: Problem, rounds: int) -> dict[str, Any]:
    """In g, by engine; an engine that cannot read the model says why."""
    *_, moment = trajectory(problem, seed=0, readings=2, every=20)
    calls: dict[str, Call] = {"gradient": lambda: gradient(moment)}
    refused = {}
    for engine in ENGINES:
        reading = Reading(moment, engine)
        try:
            reading()
        except Refusal as refusal:
            refused[engine] = str(refusal)
        else:
            calls[engine] = reading
    if problem.name == "mlp":
        calls["by hand"] = reading_by_hand(moment)
    found = ratios(calls, "gradient", rounds, warm=True)
    return {"limit": MOST_G[problem.name], "engines": found, "refused": refused}


def peak_bytes(call: Call) -> int:
    """Most bytes that were allocated at a time beyond what stood before: the running sum of the profiler's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    standing = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        standing += event.nbytes()
        most = max(most, standing)
    return most


def memory_cost(problem: Problem) -> dict[str, float]:
    """Peaks in bytes, and that of a reading over what it may be."""
    *_, moment = trajectory(problem, seed=0, readings=2, every=20)
    parameters = sum(p.numel() * p.element_size() for p in moment.model.parameters())
    reading = Reading(moment, "fused")
    first = peak_bytes(reading)
    gradient(moment)
    plain, later = peak_bytes(lambda: gradient(moment)), peak_bytes(reading)
    allowed = MOST_PEAK * plain + COPIES * parameters
    return {
        "parameters": parameters,
        "gradient": plain,
        "first_reading": first,
        "reading": later,
        "over_gradient": later / plain,
        "over_allowed": later / allowed,
        "first_over_allowed": first / allowed,
    }


class Training:
    """A loop of SGD on a model of its own; what observes it is added by those that are built on it."""

    def __init__(self, problem: Problem, batches: Sequence[Batch]) -> None:
        torch.manual_seed(0)
        self.model, self.batches = problem.model(), batches
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def plain(self) -> None:
        for x, y in self.batches:
            LOSS(self.model(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def observed(self) -> Call:
        panel = dict.fromkeys(ECONOMY, 1)
        cockpit = Cockpit(self.model, self.optimizer, loss=LOSS, panel=panel, budget=None, sinks=[], strict=True)

        def block() -> None:
            for x, y in self.batches:
                loss = LOSS(self.model(x), y)
                loss.backward()
                cockpit.observe((x, y), loss)
                self.optimizer.step()
                self.optimizer.zero_grad()

        return block

    def by_cockpit(self) -> Call:
        """With Cockpit 1.0.2, as its manual has it: two losses, both parts extended, four pieces of information."""
        peer, configuration = peer_modules()
        from backpack import extend

        model, loss_fn = extend(self.model), extend(copy.deepcopy(LOSS))
        each = nn.CrossEntropyLoss(reduction="none")
        cockpit, step = peer.Cockpit(model.parameters(), quantities=configuration("economy")), 0

        def block() -> None:
            nonlocal step
            for x, y in self.batches:
                self.optimizer.zero_grad()
                outputs = model(x)
                loss = loss_fn(outputs, y)
                known = {"batch_size": len(y), "individual_losses": each(outputs, y)}
                with cockpit(step, info={**known, "loss": loss, "optimizer": self.optimizer}):
                    loss.backward(create_graph=cockpit.create_graph(step))
                self.optimizer.step()
                step += 1

        return block


def peer_modules() -> tuple[Any, Any]:
    """Cockpit and its configurations. It asks pkg_resources for its version, which setuptools no longer has."""
    if "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None:
        missing = type("DistributionNotFound", (Exception,), {})

        def get_distribution(name: str) -> None:
            raise missing(name)

        stand_in = types.ModuleType("pkg_resources")
        vars(stand_in).update(DistributionNotFound=missing, get_distribution=get_distribution)
        sys.modules["pkg_resources"] = stand_in
    return importlib.import_module("cockpit"), importlib.import_module("cockpit.utils.configuration").configuration


def economy_cost(problem: Problem, rounds: int) -> dict[str, Any]:
    """An observed step over a plain one."""
    draw, generator = problem.data(), torch.Generator().manual_seed(0)
    batches = [draw(problem.batch, generator) for _ in range(BLOCK)]
    calls: dict[str, Call] = {
        "plain": Training(problem, batches).plain,
        "ours": Training(problem, batches).observed(),
    }
    absent = ""
    try:
        calls["cockpit"] = Training(problem, batches).by_cockpit()
    except ImportError as error:
        absent = f"Cockpit is left out ({error}); the head of this file says how to install it"
    found = ratios(calls, "plain", rounds, warm=False)
    for row in found.values():
        row["ms"] /= BLOCK
    return {"limit": MOST_ECONOMY[problem.name], "steps": found, "absent": absent}


def printed(part: str, name: str, result: dict[str, Any]) -> None:
    if part == "memory":
        print(
            f"{name}: peak of a gradient {result['gradient'] / 1e6:.2f} MB, of a reading {result['reading'] / 1e6:.2f} "
            f"MB ({result['over_gradient']:.2f} x), {result['over_allowed']:.2f} of what it may be; of the first "
            f"{result['first_reading'] / 1e6:.2f} MB ({result['first_over_allowed']:.2f})",
            flush=True,
        )
        return
    unit = "g" if part == "reading" else "x a plain step"
    print(f"{name}: {part}, limit {result['limit']} {unit}")
    for method, row in result["engines" if part == "reading" else "steps"].items():
        spread = f"({row['low']:.2f} to {row['high']:.2f})"
        print(f"  {method:12} {row['ratio']:8.2f} {unit} {spread:20} {row['ms']:8.2f} ms", flush=True)
    for engine, reason in result.get("refused", {}).items():
        print(f"  {engine:12} refuses: {reason}")
    if result.get("absent"):
        print(f"  {result['absent']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help="of reading, memory, economy (default: all)")
    parser.add_argument("--problems", nargs="+", choices=sorted(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=100, help="turns of each method (default 100; economy a third)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[Problem], dict[str, Any]]] = {
        "reading": lambda problem: reading_cost(problem, arguments.rounds),
        "memory": memory_cost,
        "economy": lambda problem: economy_cost(problem, max(2, arguments.rounds // 3)),
    }
    chosen = arguments.parts or list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"expected parts of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {"load_before": os.getloadavg()}
    for part in chosen:
        for name in arguments.problems:
            if part == "economy" and name not in MOST_ECONOMY:
                continue
            results.setdefault(part, {})[name] = result = parts[part](PROBLEMS[name])
            if not arguments.json:
                printed(part, name, result)
    results["load_after"] = os.getloadavg()
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        loads = [f"{load[0]:.1f}" for load in (results["load_before"], results["load_after"])]
        print(f"load of the machine: {' before, '.join(loads)} after")


if __name__ == "__main__":
    main()
