"""Per-example gradient statistics of one step, by whichever engine can.

With loss = total / denominator over N examples (`instruments.objective`), example i has the gradient
g_i = (N / denominator) grad(its sum), and the mean of the g_i is the gradient of the loss. No engine holds an N x D
matrix beyond a bounded chunk.

Shapes: N = examples of the step (all its micro-batches), D = trainable scalars.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from instruments.objective import Batch
from instruments.refusal import Refusal
from instruments.samples import backpack_engine, func_engine, loop_engine
from instruments.samples.independence import Undefined, refuse_hidden_parameters
from instruments.samples.problem import BatchMoments, Engine, SampleProblem

EngineName = Literal["auto", "backpack", "torch.func", "loop"]
ENGINES: dict[str, Engine] = {
    "backpack": backpack_engine.moments,
    "torch.func": func_engine.moments,
    "loop": loop_engine.moments,
}


@dataclass(frozen=True)
class SampleMoments:
    """`norms_sq_N`: |g_i|^2; `mean_D`: the mean of the g_i; `engine`: who computed them."""

    norms_sq_N: Tensor
    mean_D: Tensor
    engine: str

    @property
    def examples(self) -> int:
        return self.norms_sq_N.shape[0]


def sample_moments(problem: SampleProblem, batches: Sequence[Batch], engine: EngineName = "auto") -> SampleMoments:
    """Moments of the step's micro-batches together, as if they were one batch.

    "auto" takes BackPACK where every trained parameter sits in a layer that it knows, torch.func where that cannot, and
    a backward pass an example where neither can. Raises Refusal where a gradient of one example is not defined.
    """
    refuse_undefined(problem.module)
    names = [engine] if engine != "auto" else list(ENGINES)
    reasons = []
    for name in names:
        try:
            parts = [ENGINES[name](problem, batch) for batch in batches]
            if name != "loop":
                for part, batch in zip(parts, batches, strict=True):
                    refuse_hidden_parameters(problem, batch, part.sum_D)
            return _scaled(parts, name)
        except Refusal as refusal:
            if isinstance(refusal, Undefined) or engine != "auto":
                raise
            reasons.append(f"{name}: {refusal}")
    raise Refusal("no engine could compute per-example gradients. " + " | ".join(reasons))


def refuse_undefined(module: nn.Module) -> None:
    """Batch normalisation in training mode couples the examples: no example has a gradient of its own."""
    for name, m in module.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training:
            raise Undefined(
                f"per-example gradients are not defined: {type(m).__name__} '{name}' in training mode mixes the "
                "examples of a batch; put it in eval mode, use GroupNorm or LayerNorm, or read with mode='eval'."
            )


def _scaled(parts: Sequence[BatchMoments], engine: str) -> SampleMoments:
    denominator = sum((part.denominator for part in parts), start=0.0)
    norms_sq_N = torch.cat([part.norms_sq_N for part in parts])
    factor = norms_sq_N.shape[0] / denominator
    mean_D = sum((part.sum_D for part in parts[1:]), start=parts[0].sum_D) / denominator
    return SampleMoments(norms_sq_N * factor**2, mean_D, engine)
