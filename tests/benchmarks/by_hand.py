"""The readings of `gradient_cost` written by hand for one network: what is left to save.

Shapes: N = examples.
"""

from collections.abc import Callable

import torch
from models import Moment
from torch import Tensor, nn


def reading_by_hand(moment: Moment) -> Callable[[], list[float]]:
    """Noise scale, signal-to-noise, norm test, inner-product test and coherence of an MLP of tanh layers.

    The forward pass, the backward pass to the results of the layers, and the fewest operations on what they leave; the
    gradient of the batch is taken from `.grad`. No error bars, no medians, nothing by layer; nothing is looked up or
    checked, no state of the model or of random streams is saved, and nothing is recorded.
    """
    layers = [module for module in moment.model if isinstance(module, nn.Linear)]
    x, y = moment.batch

    def read() -> list[float]:
        inputs, outputs = [x.flatten(1)], []
        for layer in layers:
            outputs.append(nn.functional.linear(inputs[-1], layer.weight, layer.bias))
            inputs.append(outputs[-1].tanh())
        outputs_deltas = torch.autograd.grad(nn.functional.cross_entropy(outputs[-1], y), outputs)
        with torch.no_grad():
            return _numbers(layers, inputs, outputs_deltas)

    return read


def _numbers(layers: list[nn.Linear], inputs: list[Tensor], deltas: tuple[Tensor, ...]) -> list[float]:
    """delta is the gradient of the mean loss: 1/N of each example's own. The last is the sum of mean^2 / E g^2."""
    n = len(deltas[0])
    norms_N = inner_N = shares = squared = 0.0
    for layer, a, delta in zip(layers, inputs, deltas, strict=False):
        a2, delta2 = a.square(), delta.square()
        norms_N = norms_N + (a2.sum(1) + 1) * delta2.sum(1)
        inner_N = inner_N + ((delta @ layer.weight.grad) * a).sum(1) + delta @ layer.bias.grad
        for mean, squares in ((layer.weight.grad, delta2.T @ a2), (layer.bias.grad, delta2.sum(0))):
            mean2 = mean.square()
            shares, squared = shares + (mean2 / squares.clamp_min(1e-38)).sum() / n, squared + mean2.sum()
    mean_square = norms_N.sum() * n
    trace = (mean_square - squared) * n / (n - 1)
    tests = trace / squared / n, inner_N.var() * n / squared**2
    return torch.stack([trace / (squared - trace / n), *tests, squared / mean_square * n, shares]).tolist()
