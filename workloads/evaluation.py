"""Metrics on validation data that leave the model as they found it.

Legend: N examples, C classes, ... further positions of one example (the bytes of a text window).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; afterwards every module has its own train/eval flag back.

    Flags are restored one by one, because a model in training may hold parts that the user keeps in eval mode.
    """
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def classification(model: nn.Module, valid: tuple[Tensor, ...], *, chunk: int = 512) -> dict[str, float]:
    """Mean cross-entropy in nats (`valid_loss`) and share of right answers (`valid_accuracy`), per target.

    `valid` is (inputs_N..., targets_N...) with integer targets; the model answers with logits_NC.... Sums are formed
    over chunks of `chunk` examples, which bounds memory and changes the result by rounding only.
    """
    loss, right, count = 0.0, 0, 0
    inputs, targets = valid
    with evaluating(model):
        for x, y in zip(torch.split(inputs, chunk), torch.split(targets, chunk), strict=True):
            logits = model(x)
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            right += int((logits.argmax(1) == y).sum())
            count += y.numel()
    return {"valid_loss": loss / count, "valid_accuracy": right / count}
