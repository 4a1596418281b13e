"""The language model and its text: causality, tying, windows, held-out text, the n-gram reference."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from workloads.byte_lm import FACTOR, WORKLOAD, Attention, Decoder, target, text_data
from workloads.data.ngram import ngram_cross_entropy
from workloads.data.text import read_split, standard_library, windows

SMALL = {"width": 16, "heads": 2, "layers": 2, "context": 12}


def test_a_later_byte_never_changes_an_earlier_answer() -> None:
    torch.manual_seed(0)
    model = Decoder(**SMALL)
    inputs_NT = torch.randint(256, (3, 12))
    before_NVT = model(inputs_NT)
    for t in range(12):
        changed_NT = inputs_NT.clone()
        changed_NT[:, t] = (changed_NT[:, t] + 1) % 256
        after_NVT = model(changed_NT)
        torch.testing.assert_close(after_NVT[:, :, :t], before_NVT[:, :, :t], rtol=0, atol=1e-7)
        assert not torch.allclose(after_NVT[:, :, t:], before_NVT[:, :, t:], rtol=0, atol=1e-6)


def test_an_earlier_byte_changes_later_answers() -> None:
    torch.manual_seed(0)
    model = Decoder(**SMALL)
    inputs_NT = torch.randint(256, (1, 12))
    changed_NT = inputs_NT.clone()
    changed_NT[:, 0] = (changed_NT[:, 0] + 1) % 256
    assert (model(changed_NT) - model(inputs_NT)).abs().amax((0, 1)).min() > 1e-7


def test_attention_is_the_softmax_of_the_masked_products() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, 0.0).double()
    x_NTD = torch.randn(3, 5, 8, dtype=torch.float64)
    q_NTD, k_NTD, v_NTD = attention.query_key_value(x_NTD).chunk(3, -1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores_NTT = q_NTD[..., part] @ k_NTD[..., part].transpose(1, 2) / math.sqrt(4)
        mask_TT = torch.ones(5, 5).tril().bool()
        heads.append(scores_NTT.masked_fill(~mask_TT, -math.inf).softmax(-1) @ v_NTD[..., part])
    torch.testing.assert_close(attention(x_NTD), attention.output(torch.cat(heads, -1)))


def test_the_embedding_and_the_output_are_one_parameter() -> None:
    model = Decoder(**SMALL)
    assert [p.shape for p in model.parameters()].count(torch.Size([256, 16])) == 1
    row = model.embedding.weight[7].detach().clone()
    before_NVT = model(torch.zeros(1, 3, dtype=torch.int64))
    with torch.no_grad():
        model.embedding.weight[7].add_(1.0)
    after_NVT = model(torch.zeros(1, 3, dtype=torch.int64))
    assert not torch.equal(row, model.embedding.weight[7])
    assert not torch.equal(before_NVT[:, 7], after_NVT[:, 7])
    assert torch.equal(before_NVT[:, 8], after_NVT[:, 8])


def test_number_of_parameters_is_that_of_the_formula() -> None:
    D, L, T = 64, 2, 64
    per_block = (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D) + 4 * D
    assert sum(p.numel() for p in Decoder().parameters()) == 256 * D + T * D + L * per_block + 2 * D


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    x_NT, y_NT = torch.randint(256, (8, 64)), torch.randint(256, (8, 64))
    loss = nn.CrossEntropyLoss()(Decoder()(x_NT), y_NT).item()
    assert loss == pytest.approx(math.log(256), rel=0.03)


@pytest.mark.parametrize("off", ["attention", "stream"])
def test_each_dropout_acts_in_training_only(off: str) -> None:
    torch.manual_seed(0)
    model = Decoder(**SMALL, dropout=0.5)
    for block in model.blocks:
        if off == "attention":
            block.attention.dropout = 0.0
        else:
            block.dropout.p = 0.0
    inputs_NT = torch.randint(256, (2, 12))
    assert not torch.equal(model(inputs_NT), model(inputs_NT))
    model.eval()
    assert torch.equal(model(inputs_NT), model(inputs_NT))


def test_windows_that_are_too_long_and_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 12 bytes, got 13; cut them shorter"):
        Decoder(**SMALL)(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="heads to divide the width 16, got 3"):
        Decoder(width=16, heads=3)


def test_windows_pair_each_byte_with_its_successor() -> None:
    text_n = np.arange(11, dtype=np.uint8)
    inputs_NT, targets_NT = windows(text_n, context=4, stride=4)
    assert inputs_NT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert targets_NT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert windows(text_n, context=4, stride=2)[0].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    with pytest.raises(ValueError, match="more than 11 bytes of text for one window, got 11"):
        windows(text_n, context=11, stride=11)


def test_the_end_of_each_file_is_held_out(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_bytes(b"abcdefghij")
    second.write_bytes(b"ABCDEFGHIJKLMNOPQRST")
    train_n, valid_n = read_split([first, second])
    assert train_n.tobytes() == b"abcdefghiABCDEFGHIJKLMNOPQR"
    assert valid_n.tobytes() == b"jST"


def test_text_that_cannot_be_read_as_meant_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match="expected text, got 1 files with no byte"):
        read_split([empty])
    with pytest.raises(ValueError, match="got 0 files"):
        read_split([])
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        read_split([empty], held_out=1)
    with pytest.raises(ValueError, match=r"got none for no_such_module\.py; install Python"):
        standard_library(["argparse", "no_such_module"])


def slow_ngram_cross_entropy(train: bytes, valid: bytes, order: int, kappa: float) -> float:
    """The same model with one dictionary of counts per order and the recursion as it is written."""
    pairs: list[Counter[bytes]] = [Counter() for _ in range(order + 1)]
    contexts: list[Counter[bytes]] = [Counter() for _ in range(order + 1)]
    for i in range(order, len(train)):
        for k in range(order + 1):
            pairs[k][train[i - k : i + 1]] += 1
            contexts[k][train[i - k : i]] += 1

    def p(k: int, history: bytes, c: bytes) -> float:
        if k < 0:
            return 1 / 256
        h = history[len(history) - k :]
        return (pairs[k][h + c] + kappa * p(k - 1, history, c)) / (contexts[k][h] + kappa)

    probabilities = [p(order, valid[i - order : i], valid[i : i + 1]) for i in range(order, len(valid))]
    return -sum(math.log(value) for value in probabilities) / len(probabilities)


@pytest.mark.parametrize(("order", "kappa"), [(0, 1.0), (1, 0.5), (3, 16.0), (5, 2.0)])
def test_ngram_cross_entropy_is_that_of_the_dictionaries(order: int, kappa: float) -> None:
    source = Path(__file__).read_bytes()
    train, valid = source[:3000] + bytes([255, 255, 255, 0]), source[3000:4000] + bytes([255, 255, 7])
    arrays = (np.frombuffer(train, dtype=np.uint8), np.frombuffer(valid, dtype=np.uint8))
    found = ngram_cross_entropy(*arrays, order=order, kappa=kappa)
    assert found == pytest.approx(slow_ngram_cross_entropy(train, valid, order, kappa), rel=1e-12)


def test_ngram_needs_a_full_context() -> None:
    text_n = np.zeros(3, dtype=np.uint8)
    with pytest.raises(ValueError, match="more than 3 bytes of train text, got 3"):
        ngram_cross_entropy(text_n, text_n, order=3)


def test_the_workload_runs_on_the_users_own_files(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 80)
    workload = replace(WORKLOAD, load=lambda: text_data([path]))
    data = workload.load()
    assert target(data).value == pytest.approx(FACTOR * data.notes["ngram_cross_entropy"])
    assert 0 < data.notes["ngram_cross_entropy"] < 1
    torch.manual_seed(0)
    batch = next(workload.batches(data, generator=torch.Generator().manual_seed(0)))
    assert workload.make_model(data)(batch[0]).shape == (32, 256, 64)
