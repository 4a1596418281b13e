"""What the panel shows: one pane an instrument, in groups that are rows of the picture."""

from collections.abc import Mapping
from dataclasses import dataclass

PROGRESS, STEP, GRADIENT, CURVATURE = "Progress", "Step", "Gradient", "Curvature"


@dataclass(frozen=True)
class Pane:
    """One axis: outputs of one instrument by the text of their keys, and how they are drawn.

    `edge` is a fixed value that means something, `moving_edge` an output that is one, `layers` an output with one entry
    a layer, drawn as a band; `unit` takes the place of the declared one. `batch` draws the number of examples of a
    step, against which a noise scale is held. `second` names a scale on the right that is 2 y - 1 of the left one.
    """

    group: str
    title: str
    instrument: str
    curves: Mapping[str, str]
    unit: str | None = None
    log: bool = False
    noisy: bool = False
    edge: tuple[float, str] | None = None
    moving_edge: tuple[str, str] | None = None
    layers: tuple[str, str] | None = None
    batch: bool = False
    second: str = ""


PANES = (
    Pane(PROGRESS, "Training loss", "batch/loss", {"loss": "loss of the step's batch"}, log=True, noisy=True),
    Pane(PROGRESS, "Learning rate", "step/learning_rate", {"learning_rate": "all parameters"}, unit=""),
    Pane(
        STEP, "Step ratio r", "step/step_ratio", {"r": "r = ½ u'Hu / (−g'u)"}, "gain lost to curvature",
        noisy=True, edge=(1.0, "edge: nothing gained"), second="α = 2r − 1",
    ),
    Pane(
        STEP, "Update to weight |u| / |θ|", "step/update_ratio", {"update_ratio": "whole network"},
        log=True, layers=("per_layer", "least to largest layer"),
    ),
    Pane(
        STEP, "Weight norm |θ|", "network/weight_norm", {"weight_norm": "whole network"}, "",
        log=True, layers=("per_layer", "least to largest layer"),
    ),
    Pane(GRADIENT, "Gradient norm |g|", "gradient/norm", {"norm": "of the step's batch"}, log=True, noisy=True),
    Pane(
        GRADIENT, "Noise scale", "gradient/noise_scale", {"noise_scale": "tr Σ / |G|², ± standard error"},
        log=True, batch=True,
    ),
    Pane(
        GRADIENT, "Signal to noise", "gradient/signal_to_noise",
        {"aggregate": "whole gradient, ± standard error", "median": "median coordinate"},
        noisy=True, edge=(0.0, "all noise"),
    ),
    Pane(
        CURVATURE, "Sharpness", "curvature/sharpness", {"sharpness": "λ_max of the Hessian"},
        log=True, moving_edge=("edge", "this optimizer's edge"),
    ),
    Pane(
        CURVATURE, "ρ: sharpness as the optimizer sees it", "curvature/preconditioned_sharpness", {"rho": "ρ"},
        log=True, edge=(1.0, "edge of stability"),
    ),
    Pane(CURVATURE, "Smallest eigenvalue", "curvature/smallest", {"smallest": "λ_min"}, edge=(0.0, "convex above")),
)  # fmt: skip
