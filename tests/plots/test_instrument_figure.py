"""The picture of one instrument: every output by its kind, layers by name, and a reason where nothing can be drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cockpit_bench.plots import instrument_figure, save
from cockpit_bench.plots.layers import MOST_KEYS
from cockpit_bench.plots.style import CYCLE
from cockpit_bench.runlog import Event, Header, Reading, Record, Run

NAN = float("nan")
LABEL = "mine/all"
OUTPUTS = {
    "whole": {"kind": "scalar", "unit": "loss", "meaning": "the whole of it", "edge": 2.0},
    "groups": {"kind": "per-group", "unit": "1", "meaning": "of each group", "edge": None},
    "layers": {"kind": "per-layer", "unit": "1", "meaning": "of each layer", "edge": None},
    "modules": {"kind": "per-module", "unit": "1", "meaning": "of each module", "edge": None},
    "counts": {"kind": "histogram", "unit": "loss / parameter", "meaning": "of elements", "edge": None},
    "density": {"kind": "spectrum", "unit": "loss / parameter²", "meaning": "of eigenvalues", "edge": None},
    "joint": {"kind": "grid", "unit": "1", "meaning": "of pairs", "edge": None},
}
NAMES = ["conv.weight", "conv.bias", "head.weight"]
MODULES = [["conv", "relu"], ["conv", "relu"], ["relu", "head"], ["conv", "relu"]]  # of each reading


def readings(**changes: Any) -> list[Record]:
    return [
        Reading(
            LABEL, step, 0.0, "ok",
            {
                "whole": 1.0 + step, "groups": [0.1, 0.2], "layers": [1.0, NAN if step == 2 else 2.0, 3.0],
                "modules": [1.0, 2.0], "counts": [[0.0, 1.0], [3, 4]], "density": [[0.0, 1.0], [0.5, 0.1]],
                "joint": [[NAN, 0.0, 1.0], [-1.0, 2, 1], [5.0, 1, 3]], **changes,
            },
            {"whole": 0.1},
            provenance={"modules": MODULES[step]},
        )
        for step in range(4)
    ]  # fmt: skip


def make(records: list[Record], outputs: Any = OUTPUTS) -> Run:
    header = Header("x", "now", extra={"instruments": {LABEL: {"outputs": outputs}}} if outputs else {})
    layers = Event(0, 0.0, "layers", {"names": NAMES, "sizes": [1, 2, 3]})
    return Run(Path("runs/x"), header, [layers, *records], 0, {}, {}, {})


def by_title(figure: Any) -> dict[str, Any]:
    return {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}


def keys(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def texts(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_every_output_is_drawn_by_its_kind() -> None:
    axes = by_title(instrument_figure(make(readings()), LABEL))
    assert list(axes) == list(OUTPUTS)
    assert keys(axes["whole"]) == ["the whole of it, ± standard error", "edge: 2"]
    assert axes["whole"].get_ylabel() == "loss"
    assert axes["whole"].lines[0].get_ydata().tolist() == [1, 2, 3, 4]
    assert keys(axes["groups"]) == ["group 0", "group 1"]
    assert keys(axes["layers"]) == NAMES
    assert np.isnan(axes["layers"].lines[1].get_ydata()).tolist() == [False, False, True, False]
    assert "QuadMesh" in [type(drawn).__name__ for drawn in axes["counts"].collections]
    assert axes["counts"].get_ylabel() == "loss / parameter"
    assert axes["density"].get_xlabel() == "eigenvalue, loss / parameter²"
    assert axes["density"].get_title(loc="right") == "of eigenvalues"
    assert (axes["joint"].get_xlabel(), axes["joint"].get_ylabel()) == ("counts", "up")
    over_steps = {ax.get_xlabel() for name, ax in axes.items() if name not in ("density", "joint")}
    assert over_steps == {"optimizer step"}


def test_modules_have_their_own_line_whatever_a_reading_lists() -> None:
    ax = by_title(instrument_figure(make(readings()), LABEL))["modules"]
    assert keys(ax) == ["conv", "relu", "head"]
    conv, relu, head = (line.get_ydata() for line in ax.lines)
    np.testing.assert_array_equal(conv, [1, 1, NAN, 1])
    np.testing.assert_array_equal(relu, [2, 2, 1, 2])
    np.testing.assert_array_equal(head, [NAN, NAN, 2, NAN])
    unnamed = by_title(instrument_figure(make(readings(modules=[1.0, 2.0, 3.0])), LABEL))["modules"]
    assert keys(unnamed) == ["0", "1", "2"]


def test_every_due_step_is_in_sight() -> None:
    records: list[Record] = [
        Reading(LABEL, step, 0.0, "ok", {"whole": 1.0 if step == 20 else NAN}) for step in (10, 20)
    ]
    records += [Reading(LABEL, 50, 0.0, "failed", reason="broken")]
    ax = by_title(instrument_figure(make(records), LABEL))["whole"]
    low, high = ax.get_xlim()
    assert low < 10
    assert high > 50


def test_every_axis_has_ink_and_titles_are_clear_of_keys(tmp_path: Path) -> None:
    figure = instrument_figure(make(readings()), LABEL)
    save(figure, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    renderer, height = figure.canvas.get_renderer(), len(pixels)
    for name, ax in by_title(figure).items():
        x0, y0, x1, y1 = (round(edge) for edge in ax.get_window_extent().extents)
        inside = pixels[height - y1 + 2 : height - y0 - 2, x0 + 2 : x1 - 2]
        assert (inside.max(axis=-1) - inside.min(axis=-1) > 40).sum() > 100, name
        if ax.get_legend():
            title = ax._left_title.get_window_extent(renderer)
            assert ax.get_legend().get_window_extent(renderer).y1 <= title.y0 + 1, name


def test_many_layers_have_few_keys_and_a_shade_each() -> None:
    axes = by_title(instrument_figure(make(readings(layers=[float(n) for n in range(30)])), LABEL))
    layers = axes["layers"]
    assert len(layers.lines) == 30
    assert len({tuple(line.get_color()) for line in layers.lines}) == 30
    assert keys(layers)[0] == "conv.weight"
    assert keys(layers)[-1] == "29", "a layer without a name has its number"
    assert len(keys(layers)) == MOST_KEYS
    assert [line.get_color() for line in axes["groups"].lines] == list(CYCLE[:2])


def test_the_extremes_of_many_layers_have_keys() -> None:
    sizes = [1.0] * 30
    sizes[11], sizes[18] = 0.0, 50.0
    axes = by_title(instrument_figure(make(readings(layers=sizes)), LABEL))
    assert {"11", "18"} <= set(keys(axes["layers"]))
    assert len(keys(axes["layers"])) == MOST_KEYS


def test_without_declarations_the_shape_decides() -> None:
    figure = instrument_figure(make(readings(), outputs=None), LABEL)
    axes = by_title(figure)
    assert keys(axes["whole"]) == ["whole, ± standard error"]
    assert len(axes["layers"].lines) == 3
    assert "counts: no value that can be drawn as an array of unknown kind" in texts(figure)


def test_what_cannot_be_drawn_says_why() -> None:
    failed = Reading(LABEL, 0, 0.0, "failed", reason="broken on purpose")
    shown = texts(instrument_figure(make([failed]), LABEL))
    assert "nothing was read; last failed:\nbroken on purpose" in shown
    assert "1 failed" in shown
    figure = instrument_figure(make(readings(whole=NAN, layers=[NAN, NAN], counts=3.0, density=[[0.0], [NAN]])), LABEL)
    for name in ("whole", "layers", "counts", "density"):
        assert f"{name}: no value that can be drawn as" in texts(figure)


def test_values_over_many_decades_get_a_logarithmic_axis() -> None:
    records = [Reading(LABEL, step, 0.0, "ok", {"whole": 10.0**-step}) for step in range(4)]
    axes = by_title(instrument_figure(make(records, {"whole": {"kind": "scalar", "unit": "1", "edge": 0.0}}), LABEL))
    assert axes["whole"].get_yscale() == "log"
    assert len(axes["whole"].lines) == 1, "an edge at 0 has no place there"
    assert by_title(instrument_figure(make(readings()), LABEL))["whole"].get_yscale() == "linear"


def test_a_run_plots_its_panel_or_an_instrument() -> None:
    run = make(readings())
    assert list(by_title(run.plot(LABEL))) == list(OUTPUTS)
    assert "Training loss" in by_title(run.plot())
    with pytest.raises(KeyError, match="mine/all"):
        run.plot("mine/al")


def test_an_unknown_instrument_names_those_there_are() -> None:
    with pytest.raises(KeyError, match="mine/all"):
        instrument_figure(make(readings()), "mine/al")
