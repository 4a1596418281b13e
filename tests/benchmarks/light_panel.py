"""What the panel `light` adds to a training step of a network of ten million parameters, in CPU time.

    python tests/benchmarks/light_panel.py [--blocks 60] [--threads 2] [--optimizer adam] [--json]

Two copies of one network (784-2048-2048-2048-10, 10.0 million parameters, batch 128) are trained side by side in one
process, one plain and one with the cockpit: the loss, the learning rate and the gradient norm at every step, the update
ratio and the weight norm every ten, written to a run folder with its log and its TensorBoard events. Blocks of ten
steps alternate, so that whatever else the machine does meets both alike. A block costs the CPU seconds of the process,
all threads together; `tax` is the median over pairs of blocks of observed / plain - 1, and `tax_of_quiet_blocks` the
ratio of the lower quartiles. While one thread of OpenMP works the other waits, and by default it waits spinning, which
would be counted as CPU time of the cockpit; OMP_WAIT_POLICY is set to passive unless it is set already.

The second figure is what `observe` and the step's hooks take on a step where nothing is due.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import torch
from torch import Tensor, nn, optim

from cockpit_bench import Cockpit, at

WIDTHS, BATCH, BLOCK = (784, 2048, 2048, 2048, 10), 128, 10
LOSS = nn.CrossEntropyLoss()
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adam": lambda params: optim.Adam(params, lr=1e-4),
    "sgd": lambda params: optim.SGD(params, lr=1e-2, momentum=0.9),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(BATCH, WIDTHS[0], generator=generator), torch.randint(0, 10, (BATCH,), generator=generator))
        for _ in range(BLOCK)
    ]


class Still(optim.Optimizer):
    """Takes steps that change nothing: what is left of a step is its hooks."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


def cpu_seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


class Training:
    """One copy of the network; `clip` calls `clip_grad_norm_` at every step, at a limit that is never reached."""

    def __init__(self, optimizer: str, folder: str | None, clip: bool) -> None:
        self.model, self.data, self.clip = network(), batches(), clip
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.cockpit: Cockpit | None = None
        if folder is not None:
            self.cockpit = Cockpit(self.model, self.optimizer, loss=LOSS, logdir=folder, panel="light")

    def block(self) -> None:
        for x, y in self.data:
            loss = LOSS(self.model(x), y)
            loss.backward()
            if self.cockpit is not None:
                self.cockpit.observe((x, y), loss)
            if self.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), 1e6)
            self.optimizer.step()
            self.optimizer.zero_grad()


def tax(blocks: int, optimizer: str, clip: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        plain, observed = Training(optimizer, None, clip), Training(optimizer, f"{folder}/run", clip)
        pairs = []
        for index in range(blocks + 2):
            order = (plain, observed) if index % 2 else (observed, plain)
            seconds = {training: cpu_seconds(training.block) for training in order}
            pairs.append((seconds[plain], seconds[observed]))
        assert observed.cockpit is not None
        outcome = observed.cockpit.close()
    assert outcome is not None
    pairs = pairs[2:]  # the first blocks of each order open the log and fill the memory pools
    ratios = [after / before - 1 for before, after in pairs]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "tax": quarters[1],
        "tax_of_quiet_blocks": _lower_quartile(after for _, after in pairs) / _lower_quartile(b for b, _ in pairs) - 1,
        "tax_quartiles": [quarters[0], quarters[2]],
        "step_ms": statistics.median(before for before, _ in pairs) / BLOCK * 1e3,
        "observed_step_ms": statistics.median(after for _, after in pairs) / BLOCK * 1e3,
        "wall_tax": outcome.buckets["observe"] / outcome.seconds,
        "wall_tax_with_log": (outcome.buckets["observe"] + outcome.buckets["log"]) / outcome.seconds,
        "wall_ms_by_instrument": {key: paid / outcome.step * 1e3 for key, paid in outcome.tax.items()},
    }


def _lower_quartile(seconds: Iterable[float]) -> float:
    return statistics.quantiles(seconds, n=4)[0]


def idle(blocks: int, steps: int = 200) -> float:
    """Microseconds of a step on which nothing is due: a step with the cockpit's hooks less one without."""
    model, (batch, *_) = network(), batches()
    loss = LOSS(model(batch[0]), batch[1])
    loss.backward()
    plain, observed = Still(model.parameters()), Still(model.parameters())
    never_due = dict.fromkeys(("batch/loss", "step/learning_rate", "gradient/norm", "step/update_ratio"), at(0))
    cockpit = Cockpit(model, observed, loss=LOSS, panel=never_due, sinks=())

    def without() -> None:
        for _ in range(steps):
            plain.step()

    def with_cockpit() -> None:
        for _ in range(steps):
            cockpit.observe(batch, loss)
            observed.step()

    with_cockpit()
    differences = [cpu_seconds(with_cockpit) - cpu_seconds(without) for _ in range(blocks)]
    cockpit.close()
    return statistics.median(differences) / steps * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=60, help="pairs of blocks of ten steps (default 60)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam")
    parser.add_argument("--clip", action="store_true", help="clip_grad_norm_ at every step of both")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = tax(arguments.blocks, arguments.optimizer, arguments.clip)
    result["idle_step_us"] = idle(arguments.blocks)
    if arguments.json:
        print(json.dumps({**vars(arguments), **result}, indent=2))
        return
    low, high = result["tax_quartiles"]
    print(
        f"panel light, {arguments.optimizer}, {arguments.threads} threads, {arguments.blocks} pairs of blocks: step "
        f"{result['step_ms']:.1f} ms plain, {result['observed_step_ms']:.1f} ms observed (CPU)\n"
        f"  tax {result['tax']:.2%} of the CPU time (quartiles {low:.2%} to {high:.2%}), "
        f"{result['tax_of_quiet_blocks']:.2%} between the lower quartiles of the blocks; of the wall time "
        f"{result['wall_tax']:.2%} for readings, {result['wall_tax_with_log']:.2%} with the log\n"
        f"  a step with nothing due: {result['idle_step_us']:.1f} us"
    )
    for key, spent in result["wall_ms_by_instrument"].items():
        print(f"  {key:24} {spent:7.3f} ms a step")


if __name__ == "__main__":
    main()
