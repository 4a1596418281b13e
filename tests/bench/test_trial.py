"""Trials: their identity, their file, and mistakes in them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cockpit_bench.bench import algorithms
from cockpit_bench.bench.names import ALGORITHMS
from cockpit_bench.bench.trial import Trial

VALUES = st.one_of(
    st.floats(allow_nan=False),
    st.integers(-(2**40), 2**40),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.floats(0, 1)),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(st.dictionaries(st.sampled_from(["lr", "betas", "eps", "nesterov"]), VALUES), st.integers(0, 99), st.booleans())
def test_the_file_holds_the_whole_trial(tmp_path_factory: Any, chosen: dict[str, Any], seed: int, stop: bool) -> None:
    trial = Trial("digits_mlp", "sgd", chosen, seed=seed, stop_at_target=stop, steps=seed or None)
    path = tmp_path_factory.mktemp("trial") / "trial.toml"
    path.write_text(trial.to_toml(), encoding="utf8")
    again = Trial.from_toml(path)
    assert again == trial
    assert again.hash == trial.hash


def test_no_panel_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trial.toml"
    path.write_text(Trial("digits_mlp", panel=None).to_toml())
    assert Trial.from_toml(path).panel is None


def test_the_hash_is_the_description() -> None:
    base = Trial("digits_mlp", hyperparameters={"lr": 0.1, "eps": 1e-8})
    assert base.hash == Trial("digits_mlp", hyperparameters={"eps": 1e-8, "lr": 0.1}).hash
    changed = [
        Trial("digits_2c2d"),
        Trial("digits_mlp", "sgd"),
        Trial("digits_mlp", seed=1),
        Trial("digits_mlp", panel="full"),
        Trial("digits_mlp", steps=7),
        Trial("digits_mlp", hyperparameters={"lr": 0.2}),
    ]
    assert len({trial.hash for trial in [base, *changed]}) == len(changed) + 1
    assert len(base.hash) == 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "cannot be empty"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"timeout_seconds": 0.0}, "timeout_seconds"),
        ({"panel": "standart"}, "did you mean standard"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trial("digits_mlp", **wrong)


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trial.toml"
    path.write_text('workload = "digits_mlp"\nalgoritm = "sgd"\n')
    with pytest.raises(ValueError, match="did you mean algorithm"):
        Trial.from_toml(path)


def test_algorithms_are_those_of_torch() -> None:
    classes = {
        name.lower()
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    assert set(ALGORITHMS) == classes - {"lbfgs"} | {"momentum", "nesterov"}


def test_hyperparameters_come_from_alias_baseline_and_trial() -> None:
    merged = algorithms.settings("nesterov", {"lr": 0.1, "momentum": 0.8}, {"lr": 0.2})
    assert merged == {"momentum": 0.8, "nesterov": True, "lr": 0.2}
    optimizer = algorithms.make("nesterov", [torch.nn.Parameter(torch.ones(1))], merged)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["nesterov"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: algorithms.settings("adm", {}, {}), "did you mean adam"),
        (lambda: algorithms.settings("adam", {}, {"lrr": 1.0}), "did you mean lr"),
        (lambda: algorithms.make("adam", [torch.nn.Parameter(torch.ones(1))], {"lr": -1.0}), "refuses"),
    ],
)
def test_mistakes_in_algorithms_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
