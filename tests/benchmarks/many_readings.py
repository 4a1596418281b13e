"""A thousand curvature readings in a row: is memory flat, and is training the same bit for bit?

    python tests/benchmarks/many_readings.py [--readings 1000] [--json]

A network with BatchNorm and dropout is trained with Adam twice, alone and under a cockpit that reads the named
instruments at every step. Resident memory of the process is sampled every 20 steps after a collection; "growth" is the
rise of its median from the second to the last quarter of the run. Live tensors and objects are counted by the
collector. The records of the run, which stay in memory by design (2 kB a reading), are dropped as they come. Exits with
1 when a bit of the trained state differs, when live tensors grow, or when memory grows by more than 2 MiB. One thread;
Linux.
"""

import argparse
import gc
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cockpit_bench import Cockpit, batches
from cockpit_bench.testing.traces import differences, state_of

NAMES = ("curvature/sharpness", "curvature/preconditioned_sharpness", "curvature/smallest", "curvature/trace",
         "gradient/norm", "step/step_ratio")  # fmt: skip
ALLOWED = 2 * 2**20
LOSS = nn.CrossEntropyLoss()


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 20, generator=generator)
    return x, (x[:, :5] + torch.randn(64, 5, generator=generator)).argmax(1)


class Run:
    """One training of the same network."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.Tanh(),
            nn.Linear(64, 5),
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def backward(self, step: int) -> tuple[Any, Tensor]:
        x, y = batch(step)
        loss = LOSS(self.model(x), y)
        loss.backward()
        return (x, y), loss

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return state_of(self.model, [self.optimizer])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readings", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    alone, watched = Run(), Run()
    torch.manual_seed(1)
    for step in range(arguments.readings):
        alone.backward(step)
        alone.step()
    end = alone.state()

    cockpit = Cockpit(watched.model, watched.optimizer, loss=LOSS, panel=None, instruments=dict.fromkeys(NAMES, 1),
                      probe=batches(batch(-1 % 2**31)), budget=None, sinks=[])  # fmt: skip
    sizes, tensors, objects, ok = [], [], [], 0
    torch.manual_seed(1)
    for step in range(arguments.readings):
        cockpit.observe(*watched.backward(step))
        watched.step()
        ok += all(cockpit.last[name] for name in NAMES) and not any(getattr(r, "reason", "") for r in cockpit.records)
        cockpit._recorder.memory._records.clear()
        if step % 20 == 19:
            sizes.append(resident())
            tensors.append(live_tensors())
            objects.append(len(gc.get_objects()))
    quarter = len(sizes) // 4
    growth = statistics.median(sizes[-quarter:]) - statistics.median(sizes[quarter : 2 * quarter])
    result = {
        "steps_with_all_readings_ok": ok,
        "resident_MiB": sizes[-1] / 2**20,
        "growth_MiB": growth / 2**20,
        "objects": [objects[quarter], objects[-1]],
        "live_tensors": [tensors[quarter], tensors[-1]],
        "training_differs": differences(end, watched.state()),
    }
    cockpit.close()
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(f"{k:28} {v}" for k, v in result.items()))
    flat = growth <= ALLOWED and tensors[-1] <= tensors[quarter]
    sys.exit(0 if flat and not result["training_differs"] else 1)


if __name__ == "__main__":
    main()
