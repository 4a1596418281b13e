"""How large the outputs of the model are, and whether they tell inputs apart.

Shapes: N = examples, C = outputs of one prediction (classes), R = predictions (examples and positions).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from instruments.activations import OUTPUT
from instruments.batch._fields import targets_of
from instruments.instrument import Gauge, Output, Values
from instruments.objective import Batch
from instruments.refusal import Refusal
from instruments.view import Need, View

CLASSIFIER = ("log_z", "z_loss", "prediction_entropy", "possible_entropy", "probabilities")


@dataclass(frozen=True)
class OutputScale(Gauge):
    """Size and spread of what the model gives, and for classifiers its normaliser and its predictions.

    A classification has integer targets and float outputs with one dimension more: (N, C), or (N, C, ...) as
    `nn.CrossEntropyLoss` takes them; outputs (N, ..., C) are understood where the second dimension does not fit, and
    for batches in a mapping. Targets are the second of a pair or the entry "labels", "targets" or "y". Predictions
    whose target is negative (ignored, as -100) are left out. With the logits z_RC:

        log Z = logsumexp_c z_c,   z-loss = mean (log Z)^2,   logits of a fresh model: deviation near or below 1.

    log Z that drifts from 0 and |logits| that grow are the divergence that a z-loss of weight 1e-4 cures.
    `prediction_entropy` is that of the shares in which classes are predicted (argmax), up to log C: near 0 for a model
    that always answers the same. `between` is the standard deviation of an output over the batch (root mean square over
    outputs) in units of the outputs' root mean square: below 0.01 the model hardly looks at its input.
    `probabilities` is the share of predictions that are not negative and add up to 1: cross-entropy expects logits, and
    a softmax before it leaves a loss of ln(1 + (C - 1)/e) that training cannot pass.

    For everything else (regression, several binary outputs) the classifier's outputs are NaN. Read is the first tensor
    that the model returns.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "deviation": Output("output", "standard deviation of all outputs together"),
        "largest": Output("output", "largest absolute output"),
        "between": Output("1", "spread of an output over the batch, in units of the outputs' root mean square"),
        "log_z": Output("1", "mean logsumexp of the logits"),
        "z_loss": Output("1", "mean square of the logsumexp of the logits"),
        "prediction_entropy": Output("nat", "entropy of the shares in which the classes are predicted"),
        "possible_entropy": Output("nat", "log of the number of classes, or of predictions where these are fewer"),
        "probabilities": Output("1", "share of predictions that are a distribution already"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"activations", "batch"})
    reference: ClassVar[str] = (
        "Wortsman et al. 2023, Small-scale proxies for large-scale Transformer training, sec. 3.1"
    )

    def price(self, view: View) -> float:
        return 1 / 3

    def read(self, view: View) -> Values:
        outputs, kind = view.activations.get(OUTPUT), view.activations.output_type
        if outputs is None:
            raise Refusal("the loss does not call the model as a whole, so there is no output of it to read.")
        if not outputs:
            raise Refusal(
                "expected the model to return a tensor, or a tuple, list or mapping of tensors, "
                f"got {kind}, which holds none that torch can see."
            )
        if any(z.ndim == 0 or not z.is_floating_point() for z in outputs):
            raise Refusal(
                f"expected numbers for each example first in what the model returns ({kind}), got one number or "
                "integers."
            )
        paired = len(outputs) == len(view.batches)
        batches: Sequence[Batch | None] = view.batches if paired else [None] * len(outputs)
        tables, classes = zip(*map(_table, outputs, batches), strict=True)
        if len({table_RC.shape[1] for table_RC in tables}) > 1:
            raise Refusal("the model gives outputs of different widths in the micro-batches of one step.")
        z_RC = torch.cat(tables) if len(tables) > 1 else tables[0]
        classifier = _classifier(z_RC) if all(classes) and len(z_RC) else dict.fromkeys(CLASSIFIER, math.nan)
        return {**_spread(z_RC), **classifier}


def _spread(z_RC: Tensor) -> dict[str, Tensor | float]:
    if not z_RC.numel():
        return dict.fromkeys(("deviation", "largest", "between"), math.nan)
    variance, mean = torch.var_mean(z_RC, correction=0)
    low, high = z_RC.aminmax()
    between = z_RC.var(0).mean().sqrt() / (variance + mean.square()).sqrt() if len(z_RC) > 1 else math.nan
    return {"deviation": variance.sqrt(), "largest": torch.maximum(-low, high), "between": between}


def _table(z: Tensor, batch: Batch | None) -> tuple[Tensor, bool]:
    """Outputs as (R, C) in at least single precision, and whether they are logits of classes."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    y = None if batch is None else targets_of(batch)
    if y is not None and not y.is_floating_point() and z.ndim == y.ndim + 1:
        second, last = z.shape[:1] + z.shape[2:] == y.shape, z.shape[:-1] == y.shape
        if last and (isinstance(batch, Mapping) or not second):
            return z.flatten(0, -2)[y.flatten() >= 0], True
        if second:
            return z.movedim(1, -1).flatten(0, -2)[y.flatten() >= 0], True
    return z.reshape(len(z), -1), False


def _classifier(z_RC: Tensor) -> dict[str, Tensor | float]:
    log_z_R = z_RC.logsumexp(1)
    counts_C = z_RC.argmax(1).bincount(minlength=z_RC.shape[1])
    distributions_R = (z_RC >= 0).all(1) & ((z_RC.sum(1) - 1).abs() <= 1e-4)
    return {
        "log_z": log_z_R.mean(),
        "z_loss": log_z_R.square().mean(),
        "prediction_entropy": torch.special.entr(counts_C.double() / len(z_RC)).sum(),
        "possible_entropy": math.log(min(z_RC.shape)),
        "probabilities": distributions_R.double().mean(),
    }
