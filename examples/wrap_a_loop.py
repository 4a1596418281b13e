"""A plain training loop on scikit-learn's digits, with a cockpit round it: python examples/wrap_a_loop.py"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cockpit_bench import Cockpit, at_least

bunch = load_digits()
x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
torch.manual_seed(0)
loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
loss_fn = nn.CrossEntropyLoss()

epochs = 1 if "--smoke" in sys.argv else 15
goal, steps = at_least("valid_accuracy", 0.9), epochs * len(loader)
# Half a second of training pays for few readings at the default budget of 5 %, so the budget is lifted here.
with Cockpit(model, optimizer, loss=loss_fn, target=goal, steps=steps, budget=None) as cockpit:
    for _ in range(epochs):
        for inputs, targets in cockpit.batches(loader):
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            cockpit.observe((inputs, targets), loss)  # after backward, before the optimizer's step
            optimizer.step()
            optimizer.zero_grad()
        with cockpit.evaluating() as log, torch.no_grad():
            log(valid_accuracy=(model(x[1400:]).argmax(1) == y[1400:]).float().mean())

if cockpit.enabled:  # COCKPIT=off leaves nothing to print
    print("gradient norm    ", f"{cockpit.last['gradient/norm']['norm']:.3g}")
    print("noise scale      ", f"{cockpit.last['gradient/noise_scale']['noise_scale']:.3g} examples")
    print("sharpness        ", f"{cockpit.last['curvature/sharpness']['sharpness']:.3g}")
    print("rho, edge at 1   ", f"{cockpit.last['curvature/preconditioned_sharpness']['rho']:.3g}")
