"""Does the gradient vanish or explode on its way back through the layers?

Shapes: L = trained parameter tensors, M = weight matrices among them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instruments.gradient._tensors import require_gradient
from instruments.instrument import Estimate, Gauge, Output, Values
from instruments.layout import norms_of
from instruments.refusal import Refusal
from instruments.view import Need, View

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerProfile(Gauge):
    """Norm of the gradient of each parameter tensor, and its trend over the weight matrices.

    The weight matrices are the M tensors of two and more dimensions (biases and the gains of normalisation layers scale
    otherwise), in the order of the model, m = 1 first. With the backward pass, from the last to the first,

        ln |g_m| = constant + slope (M - m),

    by least squares: each layer that the gradient passes multiplies it by e^slope. Below about -0.5 with r^2 above 0.8
    it vanishes, and `first_over_last` falls under 1e-3; above +0.5, or a ratio above 70, it explodes, which is a fault
    of the initialisation if it shows at step 0. A slope without a high r^2 is a jump at one place: see `per_layer`.

    The order is that of `named_parameters()`, and stands for depth only where layers are called in the order in which
    they were made; branches side by side and layers called several times count like any others. Norms also grow with
    the size of a matrix, so widths that change from end to end put a trend of their own into the slope. Layers whose
    gradient is exactly zero or absent cannot be fitted: they are counted as `silent`. The standard error is that of
    the fit, unknown with two layers; with fewer there is no trend, and slope and r^2 are NaN. `first_over_last` is
    infinite where the last layer has no gradient, and NaN where the first has none either.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "slope": Output("1", "change of ln |g| a layer on the way back: -0.5 vanishes, 0.5 explodes", edge=0.0),
        "r_squared": Output("1", "share of the variance of ln |g| that the trend explains"),
        "first_over_last": Output("1", "norm at the first weight matrix over that at the last", edge=1.0),
        "silent": Output("layers", "weight matrices whose gradient is exactly zero or absent", edge=0.0),
        "per_layer": Output("loss / parameter", "norm of the gradient of each parameter tensor", "per-layer"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})
    reference: ClassVar[str] = (
        "Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks; "
        "limits of the ratio: Zhang et al. 2021, AutoTrainer"
    )

    def price(self, view: View) -> float:
        return 0.0

    def read(self, view: View) -> Values:
        is_weight = np.array([p.ndim >= 2 for p in view.layout.params])
        if is_weight.sum() < 2:
            raise Refusal(f"a profile over depth needs at least two weight matrices, got {is_weight.sum()}.")
        norms_L = gradient_norms(view.grads)
        norms_M = norms_L[is_weight]
        slope, r_squared = trend(norms_M)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = norms_M[0] / norms_M[-1]
        return {
            "slope": slope,
            "r_squared": r_squared,
            "first_over_last": float(ratio),
            "silent": float((norms_M == 0).sum()),
            "per_layer": norms_L,
        }


def gradient_norms(grads: tuple[Tensor | None, ...]) -> Floats:
    """(L,): norm of each gradient, 0 where there is none; one transfer."""
    require_gradient(grads)
    norms_L = np.zeros(len(grads))
    present = [index for index, g in enumerate(grads) if g is not None]
    plain = [g if g.layout is torch.strided else g.coalesce().values() for g in grads if g is not None]
    norms_L[present] = norms_of(plain).double().cpu().numpy()
    return norms_L


def trend(norms_M: Floats) -> tuple[Estimate, float]:
    """Slope of ln norm over the layers passed on the way back, and r^2; layers at exactly zero are left out."""
    passed_M = np.arange(len(norms_M))[::-1].astype(float)
    heard_M = norms_M != 0
    x, y = passed_M[heard_M], np.log(norms_M[heard_M])
    if len(x) < 2 or not np.isfinite(y).all():
        return Estimate(float("nan"), float("nan")), float("nan")
    dx, dy = x - x.mean(), y - y.mean()
    spread, scatter = dx @ dx, dy @ dy
    slope = dx @ dy / spread
    left = np.square(dy - slope * dx).sum()
    error = np.sqrt(left / (len(x) - 2) / spread) if len(x) > 2 else float("nan")
    return Estimate(float(slope), float(error)), float(1 - left / scatter) if scatter > 0 else float("nan")
