"""Blocks of an operator against rows and columns of its matrix, and the lists of blocks."""

import pytest
import torch
from cases import BY_NAME, CASES, Case, build
from gauss_newton_twin import matrix_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from instruments.layout import Layout
from instruments.operators.block import BlockOperator
from instruments.operators.blocks import ROOT, Block, by_group, by_layer, by_pattern
from instruments.operators.operator import DenseOperator


def index_of(layout: Layout, names: set[str]) -> torch.Tensor:
    """Positions of the named parameters, the slow way."""
    owner = [name for name, p in zip(layout.names, layout.params, strict=True) for _ in range(p.numel())]
    return torch.tensor([i for i, name in enumerate(owner) if name in names])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_a_block_is_its_rows_and_columns(seed: int, sizes: list[int], data: st.DataObject) -> None:
    params = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in sizes]
    layout = Layout(tuple(f"p{i}" for i in range(len(sizes))), tuple(params))
    chosen = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(layout.size, layout.size, generator=g, dtype=torch.float64)
    matrix = a + a.T
    [block] = by_group(layout, [optim.SGD([params[i] for i in reversed(chosen)], lr=0.1)])
    index = index_of(layout, {f"p{i}" for i in chosen})
    operator = BlockOperator(DenseOperator(matrix), block)
    assert torch.equal(matrix_of(operator), matrix[index][:, index])
    v_D = torch.randn(layout.size, generator=g, dtype=torch.float64)
    assert torch.equal(block.cut(v_D), v_D[index])
    assert torch.equal(block.cut(block.pad(block.cut(v_D))), v_D[index])
    assert float(block.pad(block.cut(v_D)).square().sum()) == pytest.approx(float(v_D[index].square().sum()))
    assert operator.size == block.size == len(index)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layers_make_up_the_whole(case: Case) -> None:
    layout = Layout.of(build(case).model)
    blocks = by_layer(layout)
    v_D = torch.arange(layout.size, dtype=torch.float64)
    assert torch.equal(torch.cat([b.cut(v_D) for b in blocks]).sort().values, v_D)
    assert torch.equal(sum(b.pad(b.cut(v_D)) for b in blocks), v_D)


def test_names_of_layers() -> None:
    layout = Layout.of(build(BY_NAME["called_twice_unused"]).model)
    blocks = {b.name: b for b in by_layer(layout)}
    assert list(blocks) == [ROOT, "layer", "out"]
    assert blocks["layer"].slices == (slice(2, 22),)  # weight and bias are neighbours
    tied = [b.name for b in by_layer(Layout.of(build(BY_NAME["tied_attention"]).model))]
    assert tied == ["embed", "norm", "qkv"]  # the head's weight is the embedding's


def test_groups_keep_their_numbers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    layout = Layout.of(model)
    stranger = nn.Parameter(torch.zeros(2))
    first = optim.SGD([{"params": [model[1].bias, model[0].weight]}, {"params": [stranger]}], lr=0.1)
    second = optim.Adam(model[1].parameters(), lr=0.1)
    blocks = by_group(layout, [first, second])
    assert [(b.name, b.slices) for b in blocks] == [
        ("group 0", (slice(0, 6), slice(12, 13))),
        ("group 2", (slice(9, 13),)),
    ]


def test_patterns_of_names() -> None:
    layout = Layout.of(build(BY_NAME["tied_attention"]).model)
    weights, qkv = by_pattern(layout, {"weights": "*.weight", "attention": "qkv.*"})
    assert (weights.name, qkv.name) == ("weights", "attention")
    index = index_of(layout, {"embed.weight", "norm.weight", "qkv.weight"})
    assert torch.equal(weights.cut(torch.arange(layout.size)), index)
    assert by_pattern(layout, "qkv.*") == by_pattern(layout, ["qkv.*"])
    with pytest.raises(ValueError, match=r"got 'Qkv\.\*'; there are embed\.weight"):
        by_pattern(layout, ["Qkv.*"])


def test_a_block_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a block of 3 coordinates"):
        BlockOperator(DenseOperator(torch.eye(3)), Block("other", (slice(0, 2),), 4))
