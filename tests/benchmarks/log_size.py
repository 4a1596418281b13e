"""How large the log of a run is: python tests/benchmarks/log_size.py [STEPS]

Trains a small and a many-layer network for 1,000 steps (or STEPS) with each panel and no budget, and prints the size of
log.jsonl, its records, the bytes a step, the share of arrays that have one entry a parameter tensor (per-layer
outputs), and the dearest labels. The size of a record depends on the outputs, hardly on the model's width.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cockpit_bench import Cockpit, batches
from cockpit_bench.panels import PANELS
from cockpit_bench.tables import text_table

FEATURES, WIDTH, CLASSES, N = 16, 8, 4, 8
HIDDEN = {"small": 1, "many-layer": 49}


def network(hidden: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(FEATURES, WIDTH), nn.Tanh()]
    for _ in range(hidden - 1):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def train(model: nn.Module, panel: str, steps: int, folder: Path) -> Path:
    """A run of that panel on noise; what the numbers are does not matter, but that they have all their digits."""
    optimizer, loss_fn = torch.optim.Adam(model.parameters(), lr=1e-3), nn.CrossEntropyLoss()
    probe = batches((torch.randn(N, FEATURES), torch.randint(CLASSES, (N,))))
    with Cockpit(
        model, optimizer, loss=loss_fn, logdir=folder, panel=panel, steps=steps, budget=None, probe=probe
    ) as cockpit:
        for _ in range(steps):
            batch = torch.randn(N, FEATURES), torch.randint(CLASSES, (N,))
            loss = loss_fn(model(batch[0]), batch[1])
            loss.backward()
            cockpit.observe(batch, loss)
            optimizer.step()
            optimizer.zero_grad()
    return folder / "log.jsonl"


def measured(log: Path) -> tuple[int, int, int, dict[str, int]]:
    """Bytes, records, bytes of per-layer outputs, and bytes by label."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    declared = json.loads(lines[0])["instruments"]
    by_label: dict[str, int] = {}
    per_layer = 0
    for line in lines[1:]:
        record = json.loads(line)
        label = record.get("instrument", record["kind"])
        by_label[label] = by_label.get(label, 0) + len(line.encode())
        per_layer += layered(record.get("values", {}), declared.get(label, {}).get("outputs", {}))
    return log.stat().st_size, len(lines), per_layer, by_label


def layered(values: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of the outputs of one record that are per layer, their names and quotes included."""
    chosen = {name: value for name, value in values.items() if outputs.get(name, {}).get("kind") == "per-layer"}
    return len(json.dumps(chosen, separators=(",", ":"))) - 2 if chosen else 0


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rows = [("model, panel", "tensors", "MB", "records", "bytes a step", "per layer", "dearest labels")]
    with tempfile.TemporaryDirectory() as root:
        for name, hidden in HIDDEN.items():
            for panel in PANELS:
                model = network(hidden)
                log = train(model, panel, steps, Path(root) / f"{name}-{panel}")
                size, records, per_layer, by_label = measured(log)
                top = sorted(by_label, key=lambda label: -by_label[label])[:3]
                rows.append(
                    (
                        f"{name}, {panel}",
                        str(len(list(model.parameters()))),
                        f"{size / 1e6:.2f}",
                        str(records),
                        f"{size / steps:.0f}",
                        f"{per_layer / size:.0%}",
                        ", ".join(f"{label} {by_label[label] / size:.0%}" for label in top),
                    )
                )
    print("\n".join(text_table(rows)))


if __name__ == "__main__":
    main()
