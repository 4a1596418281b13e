"""Which instruments rightly refuse a training of `loop_cases`, told from its model, loss, optimizers and labels."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loop_cases import Attention, Training, smooth
from torch import nn, optim
from torch.nn.modules.batchnorm import _BatchNorm

from instruments import catalogue
from instruments.needs import SAMPLES

MOMENTS = (
    optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop,
)  # fmt: skip
ACTIVATIONS = (nn.ReLU, nn.Tanh)
KNOWN = (*MOMENTS, optim.SGD)


def no_examples(training: Training) -> bool:
    """Batch normalisation in training mode mixes them, and a loss that is one number does not tell them apart."""
    mixing = any(isinstance(m, _BatchNorm) and m.training for m in training.model.modules())
    return mixing or one_number(training)


def one_number(training: Training) -> bool:
    batch = training.case.batch(0)
    loss = training.case.loss
    return not isinstance(loss, nn.Module) and loss(training.model, batch).ndim == 0


def no_activation(training: Training) -> bool:
    return isinstance(training.model, Attention)


def by_input(training: Training) -> bool:
    return training.case.loss is smooth


def of_all(training: Training, kinds: Any) -> bool:
    return all(isinstance(optimizer, kinds) for optimizer in training.optimizers)


def of_any(training: Training, kinds: Any) -> bool:
    return any(isinstance(optimizer, kinds) for optimizer in training.optimizers)


def unknown_optimizer(training: Training) -> bool:
    return not of_all(training, KNOWN)


@dataclass(frozen=True)
class Rule:
    """`refuses(training)`, and what the reason says then."""

    refuses: Callable[[Training], bool]
    reason: str


NO_EXAMPLES = Rule(no_examples, "examples")
NO_MOMENT = Rule(lambda training: not of_any(training, MOMENTS), "second moment")
RULES: Mapping[str, Rule] = {
    **{
        name: NO_EXAMPLES
        for name in catalogue.builtin_names()
        if catalogue.make(name).needs & (SAMPLES | {"step_examples", "fisher", "example_gradients"})
    },
    "batch/example_loss": Rule(one_number, "single number"),
    "curvature/preconditioned_sharpness": Rule(
        lambda training: not of_all(training, KNOWN), "no preconditioner reader|is not defined for"
    ),
    "curvature/tic": Rule(
        lambda training: no_examples(training) or by_input(training), "examples|by its input .* read the Hessian"
    ),
    "curvature/trace": Rule(by_input, "by its input .* read the Hessian"),
    "gradient/suggested_batch": Rule(
        lambda training: no_examples(training) or not of_all(training, optim.SGD), "torch's SGD|examples"
    ),
    "network/attention_logits": Rule(lambda training: not isinstance(training.model, Attention), "no attention"),
    "network/dead_units": Rule(no_activation, "no activation"),
    "network/normalisation_statistics": Rule(
        lambda training: not any(isinstance(m, _BatchNorm) for m in training.model.modules()), "no batch normalisation"
    ),
    "optimizer/epsilon_share": NO_MOMENT,
    "optimizer/rms": NO_MOMENT,
    "optimizer/second_moment_age": NO_MOMENT,
}


def expected_refusals(training: Training, among: Iterable[str] | None = None) -> set[str]:
    """The labels that refuse this training, of those that are read."""
    names = set(catalogue.names() if among is None else among)
    return {name for name, rule in RULES.items() if name in names and rule.refuses(training)}


def check_failed(training: Training, failed: Mapping[str, str], among: Iterable[str] | None = None) -> None:
    """`failed` (label to reason) is just what is expected, and every reason is the expected one."""
    assert set(failed) == expected_refusals(training, among)
    for name, reason in failed.items():
        assert re.search(RULES[name].reason, reason), (name, reason)
