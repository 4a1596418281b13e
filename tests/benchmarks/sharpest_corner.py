"""How good the search of `curvature/generalized_sharpness` is: 1, 4 and 30 starts along the training of a classifier.

    python tests/benchmarks/sharpest_corner.py

A line a reading: for each number of starts the value and the lowest end, as shares of the best found by any of them,
and the products taken. Those of 1 and 4 starts go on from their last reading, those of 30 begin anew.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from instruments import Probe, View
from instruments.curvature.generalized_sharpness import GeneralizedSharpness
from instruments.objective import as_objective

STARTS, FRESH, EVERY, READINGS = (1, 4, 30), 30, 50, 5


def readings(norm: str, seed: int) -> None:
    torch.manual_seed(seed)
    bunch = load_digits()
    batch = torch.tensor(bunch.data[:512] / 16, dtype=torch.float32), torch.tensor(bunch.target[:512])
    model, loss_fn = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    states = {}
    for step in range(EVERY * (READINGS - 1) + 1):
        optimizer.zero_grad()
        loss_fn(model(batch[0]), batch[1]).backward()
        if step % EVERY == 0:
            found = {}
            for starts in STARTS:
                instrument = GeneralizedSharpness(norm=norm, starts=starts)
                with Probe(model, as_objective(loss_fn), [optimizer], [batch], step=step) as probe:
                    view = View(probe, instrument.needs)
                    state = instrument.init() if starts == FRESH else states.get(starts, instrument.init())
                    values, states[starts] = instrument.advance(view, state)
                    found[starts] = float(values["sharpness"]), float(values["lowest"]), view.meter.products
            best = max(value for value, _, _ in found.values())
            shares = (f"{n:2d}: {v / best:.3f} {low / best:.3f} {p:3d}" for n, (v, low, p) in found.items())
            print(f"{norm:8s} seed {seed} step {step:3d}   {'   '.join(shares)}   best {best:.4g}", flush=True)
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for norm in ("max", "spectral"):
        for seed in (0, 1):
            readings(norm, seed)
