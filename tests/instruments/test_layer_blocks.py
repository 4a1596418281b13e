"""Sharpness and trace of layers, against diagonal blocks of the dense Hessian."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import Built
from taking import case, take
from torch import Tensor
from twins import dense_hessian, trainable

from instruments import Probe, View
from instruments.curvature.blocks import Blocks
from instruments.objective import as_objective

SHARP = Blocks(tol=1e-6, max_products=200)


def dense_blocks(built: Built) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole Hessian and, by module name, its blocks; parameters are grouped by what stands before the last dot."""
    h_DD = dense_hessian(built.model, built.loss, built.batch)
    places: dict[str, list[int]] = {}
    at = 0
    for name, p in trainable(built.model).items():
        places.setdefault(".".join(name.split(".")[:-1]) or "(model)", []).extend(range(at, at + p.numel()))
        at += p.numel()
    return h_DD, {name: h_DD[index][:, index] for name, index in places.items()}


def top(h: Tensor) -> float:
    return float(torch.linalg.eigvalsh(h)[-1])


NAMES = ["mlp", "cnn", "tied_attention", "recurrent", "called_twice_unused", "frozen", "bare_parameters", "residual"]


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_its_dense_block(name: str) -> None:
    built = case(name)
    h_DD, blocks = dense_blocks(built)
    state: Any = None
    for step in range(2):
        values, state, provenance = take(SHARP, built, state=state, step=step)
        assert provenance["modules"] == list(blocks)
        tops = [top(h) for h in blocks.values()]
        assert values["eigenvalue"] == pytest.approx(tops, rel=1e-4, abs=1e-6)
        traces = torch.tensor([float(h.trace()) for h in blocks.values()])
        assert ((values["trace"] - traces).abs() <= 4 * values["trace_stderr"] + 1e-6).all()
        assert values["sharpness"] == pytest.approx(top(h_DD), rel=1e-4)
        assert values["share"] == pytest.approx(max(tops) / top(h_DD), rel=1e-3)
        assert values["largest"] == float(np.argmax(tops))
        assert values["converged"] == 1.0
        assert 0 < values["share"] <= 1 + 1e-4  # interlacing


def products(instrument: Blocks, built: Built, state: Any, step: int) -> tuple[int, Any]:
    with Probe(built.model, as_objective(built.loss), [], [built.batch], step=step) as probe:
        view = View(probe, instrument.needs)
        _, state = instrument.advance(view, instrument.init() if state is None else state)
    return view.meter.products, state


def test_a_second_reading_costs_less() -> None:
    built = case("residual")
    first, state = products(Blocks(), built, None, 0)
    second, _ = products(Blocks(), built, state, 1)
    assert second < first
    assert [len(v) for v in state["vectors"]] == [55, 20, 20, 15]


def test_only_the_largest_blocks_are_read_in_the_order_of_the_model() -> None:
    values, state, provenance = take(Blocks(most=2), case("residual"))
    assert provenance["modules"] == ["a", "b"]
    assert len(values["eigenvalue"]) == 2
    assert len(state["vectors"]) == 3


def test_patterns_name_other_blocks() -> None:
    built = case("residual")
    values, _, provenance = take(Blocks(patterns=("*.bias", "a.*"), tol=1e-6, max_products=100), built)
    assert provenance["modules"] == ["*.bias", "a.*"]
    h_DD = dense_hessian(built.model, built.loss, built.batch)
    biases = [*range(16, 20), *range(36, 40), *range(52, 55)]
    assert values["eigenvalue"] == pytest.approx([top(h_DD[biases][:, biases]), top(h_DD[:20, :20])], rel=1e-4)


def test_memory_of_other_blocks_is_dropped() -> None:
    _, state, _ = take(Blocks(), case("mlp"))
    values, _, _ = take(Blocks(), case("residual"), state=state)
    assert np.isfinite(values["eigenvalue"]).all()


def test_a_broken_model_is_nan_and_is_forgotten() -> None:
    built = case("mlp")
    _, state, _ = take(Blocks(), built)
    kept = built.model[0].weight.detach().clone()
    with torch.no_grad():
        built.model[0].weight.fill_(torch.nan)
    values, state, _ = take(Blocks(), built, state=state)
    assert np.isnan(values["eigenvalue"]).all()
    assert np.isnan([values["share"], values["largest"], values["sharpness"]]).all()
    with torch.no_grad():
        built.model[0].weight.copy_(kept)
    values, _, _ = take(Blocks(), built, state=state)
    assert np.isfinite(values["share"])
