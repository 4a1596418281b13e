"""Panels: named sets of instruments with their cadences, chosen by price.

    light      what costs next to nothing: loss, learning rate and gradient norm at every step, the relative size of the
               step and the weights every ten
    standard   light, the gradient distribution about 200 times a run and curvature about 40 times
    full       everything in the catalogue but what is experimental: single examples about 200 times, layers and data 50
               times, the dearest (spectra, blocks) a few times; what does not apply to the model says so once and is
               retired

Cadences are in readings a run, so that a panel costs the same share of a short and of a long run; where the length of
the run is not known they fall back to a fixed period.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

from cockpit_bench.cadence import Cadence, as_cadence, every, spread
from instruments import catalogue

if TYPE_CHECKING:
    from instruments.instrument import Instrument


@dataclass(frozen=True)
class Readings:
    """About `count` readings a run, or every `period` steps where the number of steps is not known."""

    count: int
    period: int

    def resolve(self, steps: int | None) -> Cadence:
        return every(self.period) if steps is None else spread(min(self.count, steps), steps)


EVERY_STEP = 1
LIGHT: Mapping[str, int | Readings] = {
    "batch/loss": EVERY_STEP,
    "step/learning_rate": EVERY_STEP,
    "gradient/norm": EVERY_STEP,
    "step/update_ratio": 10,
    "network/weight_norm": 10,
}
PER_EXAMPLE = (
    "batch/example_loss", "gradient/noise_scale", "gradient/signal_to_noise", "gradient/gradient_tests",
    "gradient/coherence", "gradient/early_stopping", "gradient/suggested_batch",
)  # fmt: skip
STEP_AND_STATE = (
    "gradient/angle", "gradient/layer_profile", "gradient/step_cosine", "step/clipping", "step/distance",
    "step/effective_learning_rate", "optimizer/rms", "optimizer/epsilon_share", "optimizer/update_scale",
    "optimizer/second_moment_age", "batch/input_moments", "batch/label_counts",
)  # fmt: skip
LAYERS_AND_DATA = (
    "gradient/histogram", "gradient/histogram_2d", "gradient/example_histogram", "network/activation_scale",
    "network/attention_logits", "network/dead_units", "network/effective_rank", "network/normalisation_statistics",
    "network/output_scale",
)  # fmt: skip
PANELS: Mapping[str, Mapping[str, int | Readings]] = {
    "light": LIGHT,
    "standard": {
        **LIGHT,
        "gradient/noise_scale": Readings(200, 10),
        "gradient/signal_to_noise": Readings(200, 10),
        "step/step_ratio": Readings(200, 10),
        "curvature/sharpness": Readings(40, 50),
        "curvature/preconditioned_sharpness": Readings(40, 50),
    },
    "full": {
        **LIGHT,
        **dict.fromkeys(PER_EXAMPLE, Readings(200, 10)),
        **dict.fromkeys(STEP_AND_STATE, 10),
        **dict.fromkeys(LAYERS_AND_DATA, Readings(50, 50)),
        "batch/repeated": EVERY_STEP,
        "step/step_ratio": Readings(200, 10),
        "step/alpha": Readings(100, 20),
        "step/critical_learning_rate": Readings(20, 100),
        "curvature/sharpness": Readings(40, 50),
        "curvature/preconditioned_sharpness": Readings(40, 50),
        "curvature/directional": Readings(40, 50),
        "curvature/batch_sharpness": Readings(40, 50),
        "curvature/smallest": Readings(10, 200),
        "curvature/trace": Readings(10, 200),
        "curvature/tic": Readings(10, 200),
        "curvature/outliers": Readings(4, 500),
        "curvature/blocks": Readings(4, 500),
        "curvature/density": Readings(2, 1000),
        "curvature/exact": Readings(2, 1000),
    },
}


@dataclass(frozen=True)
class Slot:
    """One instrument of a run, under the label that the log knows it by, and when it is due."""

    label: str
    instrument: "Instrument"
    due: Cadence


def members(panel: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The mapping behind a panel's name; a mapping is taken as it is, None is empty."""
    if panel is None:
        return {}
    if isinstance(panel, str):
        if panel not in PANELS:
            raise ValueError(f"expected the name of a panel, got '{panel}'; {catalogue.nearest(panel, PANELS)}.")
        return PANELS[panel]
    return panel


def assemble(
    panel: str | Mapping[str, Any] | None, instruments: Mapping[str, Any] | None, steps: int | None
) -> list[Slot]:
    """The slots of a panel and of the user's own keys; a key that both have is taken from the user.

    A value is a cadence (the label names the instrument), or (instrument, cadence), where the instrument is an
    instance or a name.
    """
    for name, given in (("panel", panel), ("instruments", instruments)):
        if not isinstance(given, Mapping | NoneType) and not (name == "panel" and isinstance(given, str)):
            raise ValueError(
                f"expected {name} as a mapping from label to cadence, got {given!r}; write for example "
                '{"curvature/sharpness": 50} for a reading at every fiftieth step.'
            )
    merged = {**members(panel), **(instruments or {})}
    return [_slot(label, value, steps) for label, value in merged.items()]


def _slot(label: str, value: Any, steps: int | None) -> Slot:
    from instruments.instrument import Instrument

    source: Any = label
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"expected (instrument, cadence) for '{label}', got {value!r}.")
        source, value = value
    if isinstance(value, Instrument):
        raise ValueError(
            f"expected a cadence for '{label}', got the instrument {value!r} alone; for a reading at every tenth step "
            f"write ({type(value).__name__}(...), 10)."
        )
    instrument = catalogue.make(source) if isinstance(source, str) else source
    if not isinstance(instrument, Instrument):
        raise ValueError(
            f"expected an instrument (an instance, not a class) for '{label}', got {instrument!r}; "
            "write for example (Sharpness(tol=1e-3), at(0, 10, 100))."
        )
    due = value.resolve(steps) if isinstance(value, Readings) else as_cadence(value)
    return Slot(label, instrument, due)


def declared(slots: Iterable[Slot]) -> dict[str, Any]:
    """What the instruments of a run declare about their outputs: the log's header carries it, so the log explains
    itself."""
    return {
        slot.label: {
            "class": f"{type(slot.instrument).__module__}.{type(slot.instrument).__qualname__}",
            "settings": {name: repr(value) for name, value in vars(slot.instrument).items()},
            "outputs": {name: asdict(output) for name, output in slot.instrument.outputs.items()},
        }
        for slot in slots
    }


def describe(panel: str) -> str:
    """The members of a panel and when they are due, in one line."""

    def when(value: int | Readings) -> str:
        return (
            f"{value.count} a run" if isinstance(value, Readings) else "every step" if value == 1 else f"every {value}"
        )

    return ", ".join(f"{name} ({when(value)})" for name, value in PANELS[panel].items())
