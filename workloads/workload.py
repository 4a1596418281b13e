"""What a workload is: a training problem with data, model, loss, metric, target and a budget of steps.

A workload trains nothing and times nothing; it hands out the pieces, and whoever runs it seeds, loops and measures.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workloads.target import Target

ALGORITHMS = ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop")

Batch = tuple[Tensor, ...]
LossFunction = Callable[[Callable[..., Tensor], Batch], Tensor]


@dataclass(frozen=True, eq=False)
class Data:
    """The examples of a workload; along the first dimension of every tensor stand the examples.

    `sha256` identifies the contents (`fingerprint`; `hashed` fills it in), so that results on other data are not
    mistaken for comparable ones. `notes` are numbers that came out of loading and that the target may depend on,
    such as the score of a reference predictor. Two Data are equal only if they are the same object, because tensors
    have no single truth value; compare `sha256` to compare contents.
    """

    train: Batch
    valid: Batch
    sha256: str
    notes: Mapping[str, float]

    def __post_init__(self) -> None:
        for part, tensors in (("train", self.train), ("valid", self.valid)):
            lengths = [len(tensor) for tensor in tensors]
            if not lengths or len(set(lengths)) > 1 or lengths[0] == 0:
                raise ValueError(
                    f"expected {part} tensors with one common, non-zero number of examples, got {lengths}; "
                    "cut them to the same examples: inputs would meet the targets of others"
                )


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over type, shape and row-major bytes of the tensors in the order given: 64 hex digits.

    Memory layout, device and gradient requirements do not count.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def hashed(train: Batch, valid: Batch, notes: Mapping[str, float] | None = None) -> Data:
    """Data with the fingerprint of its training tensors followed by its validation tensors."""
    return Data(train, valid, fingerprint(*train, *valid), dict(notes or {}))


@dataclass(frozen=True, eq=False, kw_only=True)
class Workload:
    """One training problem. Everything here is a setting or a function; a workload has no state.

    name: the module's name, by which it is asked for. summary: one line for lists.
    load: builds the data, the same on every call and without touching torch's global generator.
    make_model: builds the model with the global torch generator, which the caller has seeded.
    loss: a loss module on (model(inputs), targets), for batches (inputs, targets); or a function
        losses(call, batch) -> losses_N, one loss per example, where `call` runs the model forward.
    evaluate: metrics of the model on the validation tensors. Leaves train/eval flags and generators as they were.
    target: the target, given the data, because some targets are relative to a number in `data.notes`.
    batch_size: examples per step. steps: the budget, in optimizer steps. evaluate_every: in steps.
    baselines: algorithm (one of ALGORITHMS) -> hyperparameters that were calibrated on this workload, `lr` among them.

    Raises ValueError where a field cannot be meant: a budget below one step, an evaluation that never comes, a
    baseline without a learning rate.
    """

    name: str
    summary: str
    load: Callable[[], Data]
    make_model: Callable[[Data], nn.Module]
    loss: nn.Module | LossFunction
    evaluate: Callable[[nn.Module, Batch], dict[str, float]]
    target: Callable[[Data], Target]
    batch_size: int
    steps: int
    evaluate_every: int
    baselines: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"expected a module's name, got {self.name!r}; runs are filed and found under it")
        if not self.summary.strip() or "\n" in self.summary:
            raise ValueError(f"{self.name}: expected a summary of one line, got {self.summary!r}; lists show it whole")
        for label in ("load", "make_model", "loss", "evaluate", "target"):
            if not callable(getattr(self, label)):
                raise ValueError(
                    f"{self.name}: expected {label} to be callable, got {getattr(self, label)!r}; "
                    "pass the function itself, not its result"
                )
        for label in ("batch_size", "steps", "evaluate_every"):
            if getattr(self, label) < 1:
                raise ValueError(f"{self.name}: expected {label} >= 1, got {getattr(self, label)}; nothing would train")
        if self.evaluate_every > self.steps:
            raise ValueError(
                f"{self.name}: expected evaluate_every <= steps = {self.steps}, got {self.evaluate_every}; "
                "evaluate earlier, or every run misses its target unseen"
            )
        for algorithm, hyperparameters in self.baselines.items():
            _check_baseline(self.name, algorithm, hyperparameters)

    def batches(self, data: Data, *, generator: torch.Generator) -> Iterator[Batch]:
        """Whole batches of training examples without end, reshuffled at every epoch.

        All randomness comes from `generator` (on the CPU): equal generators give equal batches, and the global one is
        not drawn from. What is left of an epoch after its last whole batch is dropped, so every step sees `batch_size`
        examples. Raises ValueError, at once, if the data are fewer than one batch.
        """
        num_examples = len(data.train[0])
        if num_examples < self.batch_size:
            raise ValueError(
                f"{self.name}: expected at least one batch of {self.batch_size} examples, got {num_examples}; "
                "use a smaller batch_size or more data: no epoch would have a batch"
            )
        return _endless(data.train, self.batch_size, generator)


def _endless(train: Batch, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    num_examples = len(train[0])
    while True:
        order = torch.randperm(num_examples, generator=generator)
        for start in range(0, num_examples - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield tuple(tensor[chosen] for tensor in train)


def _check_baseline(name: str, algorithm: str, hyperparameters: Mapping[str, float]) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{name}: expected a baseline for one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    lr = hyperparameters.get("lr", math.nan)
    if not 0 < lr < math.inf:
        raise ValueError(
            f"{name}: expected a finite lr > 0 in the baseline of {algorithm}, got {dict(hyperparameters)}; "
            "calibrate it: a baseline is there to be run as it stands"
        )
