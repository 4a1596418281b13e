"""What is read of the second moment, against averages built from the recorded gradients number by number."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from cases import BY_NAME, Built, build
from loops import Loop, read, run
from torch import Tensor, nn, optim

from instruments import Refusal
from instruments.optimizer.epsilon_share import EpsilonShare
from instruments.optimizer.rms import Rms
from instruments.optimizer.second_moment_age import SecondMomentAge

STEPS, EPS = 6, 0.02
Optimizers = Callable[[Sequence[nn.Parameter]], optim.Optimizer]
Twin = tuple[list[float], list[float], float, float]
"""v_hat and root of each coordinate, eps, averaging length."""

MAKERS: dict[str, Optimizers] = {
    "adam": lambda p: optim.Adam(p, betas=(0.9, 0.8), eps=EPS),
    "adam_decay": lambda p: optim.Adam(p, betas=(0.9, 0.8), eps=EPS, weight_decay=0.3),
    "adam_ascent": lambda p: optim.Adam(p, lr=1e-4, betas=(0.9, 0.8), eps=EPS, weight_decay=0.3, maximize=True),
    "adamw": lambda p: optim.AdamW(p, betas=(0.9, 0.8), eps=EPS, weight_decay=0.3),
    "amsgrad": lambda p: optim.AdamW(p, betas=(0.9, 0.5), eps=EPS, amsgrad=True),
    "nadam": lambda p: optim.NAdam(p, betas=(0.9, 0.8), eps=EPS),
    "radam": lambda p: optim.RAdam(p, betas=(0.9, 0.8), eps=EPS),
    "adamax": lambda p: optim.Adamax(p, betas=(0.9, 0.8), eps=EPS),
    "rmsprop": lambda p: optim.RMSprop(p, alpha=0.7, eps=EPS),
    "rmsprop_centred": lambda p: optim.RMSprop(p, alpha=0.7, eps=EPS, centered=True, momentum=0.5),
    "adadelta": lambda p: optim.Adadelta(p, rho=0.7, eps=EPS**2),
    "adagrad": lambda p: optim.Adagrad(p, eps=EPS),
    "adagrad_begun": lambda p: optim.Adagrad(p, eps=EPS, initial_accumulator_value=0.01),
}


def taken_in(history: list[tuple[Tensor | None, Tensor]], group: dict[str, Any]) -> list[list[float]]:
    """Gradients as the second moment sees them, one list a step, coordinates as plain numbers."""
    coupled = 0.0 if group.get("decoupled_weight_decay", False) else group["weight_decay"]
    sign = -1 if group["maximize"] else 1
    return [(sign * g + coupled * p).flatten().tolist() for g, p in history if g is not None]


def averaged(column: Sequence[float], beta: float) -> float:
    """v after these gradients of one coordinate, by explicit weights."""
    t = len(column)
    return sum((1 - beta) * beta ** (t - 1 - k) * g * g for k, g in enumerate(column))


def twin(name: str, past: list[list[float]], group: dict[str, Any]) -> Twin:
    """From the definitions, with explicit weights of the past, one coordinate after the other."""
    t, columns = len(past), list(zip(*past, strict=True))
    if name.startswith("adagrad"):
        begun = group["initial_accumulator_value"]
        sums = [begun + sum(g * g for g in column) for column in columns]
        return [s / t for s in sums], [math.sqrt(s) for s in sums], EPS, float(t)
    beta = group["betas"][1] if "betas" in group else group["rho" if name == "adadelta" else "alpha"]
    weights = [(1 - beta) * beta ** (t - 1 - k) for k in range(t)]
    total = sum(weights)
    averages = [averaged(column, beta) for column in columns]
    v_hat, length = [v / total for v in averages], total / (1 - beta)
    if name == "adamax":
        roots = [max(0.0, max(beta ** (t - 1 - k) * (abs(g) + EPS) for k, g in enumerate(c)) - EPS) for c in columns]
        return [r * r for r in roots], roots, EPS, length
    if name == "amsgrad":
        v_hat = [max(averaged(column[: s + 1], beta) for s in range(t)) / total for column in columns]
    if name == "rmsprop":
        return v_hat, [math.sqrt(v) for v in averages], EPS, length
    if name == "rmsprop_centred":
        means = [sum(w * g for w, g in zip(weights, column, strict=True)) for column in columns]
        return v_hat, [math.sqrt(v - m * m) for v, m in zip(averages, means, strict=True)], EPS, length
    if name == "adadelta":
        return v_hat, [math.sqrt(v) for v in averages], EPS, length
    eps = EPS / math.sqrt(total) if name == "radam" else EPS
    return v_hat, [math.sqrt(v) for v in v_hat], eps, length


def close(found: Any, expected: Any) -> None:
    found = found.tolist() if hasattr(found, "tolist") else found
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9, nan_ok=True)  # the optimizers count steps in float32


@pytest.mark.parametrize("case", ["mlp", "cnn", "tied_attention", "recurrent", "called_twice_unused", "frozen"])
@pytest.mark.parametrize("name", MAKERS)
def test_readings_are_those_of_explicit_averages(name: str, case: str) -> None:
    built = build(BY_NAME[case])
    optimizer = MAKERS[name]([p for p in built.model.parameters() if p.requires_grad])
    loop = run(built, [optimizer], STEPS)
    rms, share, age = (read(loop, instrument) for instrument in (Rms(), EpsilonShare(), SecondMomentAge()))
    ratios: list[list[float]] = []  # g^2 / v_hat of each tensor
    floored: list[list[float]] = []
    below: list[list[bool]] = []
    length = 0.0
    for history in loop.history.values():
        seen = taken_in(history, optimizer.param_groups[0])
        if not seen:
            for values in (ratios, floored, below):
                values.append([])
            continue
        v_hat, roots, eps, length = twin(name, seen[:-1], optimizer.param_groups[0])
        pairs = [(g, v) for g, v in zip(seen[-1], v_hat, strict=True) if v]
        ratios.append([g * g / v for g, v in pairs])
        floored.append([g * g / max(v, eps * eps) for g, v in pairs])
        below.append([root < eps for root in roots])
    layers = [math.sqrt(sum(r) / len(r)) if r else math.nan for r in floored]
    flat, flat_floored = list(chain(*ratios)), list(chain(*floored))
    close(rms["per_layer"], layers)
    close(rms["rms"], math.sqrt(sum(flat_floored) / len(flat_floored)))
    known = [x for x in layers if not math.isnan(x)]
    close(rms["largest"], max(known))
    assert layers[int(rms["largest_layer"])] == max(known)
    close(rms["unheard"], 1 - len(flat_floored) / sum(map(len, below)))
    close(share["per_layer"], [sum(b) / len(b) if b else math.nan for b in below])
    close(share["share"], sum(map(sum, below)) / sum(map(len, below)))
    close(share["silent"], 1 - len(flat) / sum(map(len, below)))
    close(age["median_ratio"], sorted(flat)[(len(flat) - 1) // 2])
    close(age["far_share"], sum(r > 10 for r in flat) / len(flat))
    close(age["far_share_per_layer"], [sum(x > 10 for x in r) / len(r) if r else math.nan for r in ratios])
    close(age["averaging_length"], [length])
    assert age["steps_taken"].tolist() == [STEPS]


def test_the_cases_reach_both_sides_of_eps() -> None:
    """Otherwise a share of 0 or 1 everywhere would prove nothing."""
    shares = []
    for make in MAKERS.values():
        built = build(BY_NAME["mlp"])
        loop = run(built, [make(list(built.model.parameters()))], STEPS)
        shares.append(float(read(loop, EpsilonShare())["share"]))
    assert sum(0 < share < 1 for share in shares) >= 6


def two_groups(built: Built) -> optim.Optimizer:
    first, *rest = built.model.parameters()
    return optim.Adam([{"params": [first]}, {"params": rest, "betas": (0.9, 0.5)}], betas=(0.9, 0.8))


def test_groups_have_their_own_memory() -> None:
    built = build(BY_NAME["mlp"])
    age = read(run(built, [two_groups(built)], STEPS), SecondMomentAge())
    expected = [(1 - 0.8**STEPS) / 0.2, (1 - 0.5**STEPS) / 0.5]
    assert age["averaging_length"].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_before_the_first_step_everything_is_unknown(name: str) -> None:
    built = build(BY_NAME["mlp"])
    optimizer = MAKERS[name](list(built.model.parameters()))
    loop = run(built, [optimizer], 0)
    states = {key: len(state) for key, state in optimizer.state.items()}
    for instrument in (Rms(), EpsilonShare(), SecondMomentAge()):
        for value in read(loop, instrument).values():
            assert torch.as_tensor(value).isnan().all()
    assert {key: len(state) for key, state in optimizer.state.items()} == states  # nothing was created


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: optim.SGD(p, lr=0.1), "SGD"),
        (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), "SGD"),
        (lambda p: optim.Rprop(p), "Rprop"),
        (lambda p: optim.LBFGS(p), "LBFGS"),
        (lambda p: type("Own", (optim.Adam,), {"step": lambda self, closure=None: None})(p), "Own"),
    ],
)
@pytest.mark.parametrize("instrument", [Rms(), EpsilonShare(), SecondMomentAge()], ids=lambda i: type(i).__name__)
def test_optimizers_without_one_are_refused_by_name(make: Any, name: str, instrument: Any) -> None:
    built = build(BY_NAME["mlp"])
    loop = run(built, [make(list(built.model.parameters()))], 0)
    with pytest.raises(Refusal, match=f"got {name}; read step/update_ratio"):
        read(loop, instrument)


def test_a_subclass_that_steps_like_its_parent_is_read() -> None:
    built = build(BY_NAME["mlp"])
    own = type("Own", (optim.Adam,), {})
    assert float(read(run(built, [own(list(built.model.parameters()))], STEPS), Rms())["rms"]) > 0


def test_beside_an_optimizer_without_one_the_other_is_read() -> None:
    built = build(BY_NAME["mlp"])
    first, *rest = built.model.parameters()
    loop = run(built, [optim.SGD([first], lr=0.1), optim.Adam(rest)], STEPS)
    assert read(loop, Rms())["per_layer"].isnan().tolist() == [True, False, False, False]
    assert read(loop, EpsilonShare())["per_layer"].isnan().tolist() == [True, False, False, False]
    assert math.isnan(read(loop, SecondMomentAge())["averaging_length"][0])


def fabricated(v: list[float], g: list[float]) -> Loop:
    """One parameter whose state is given: ten thousand steps, so that no correction is left."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(len(v), dtype=torch.float64))])
    optimizer = optim.Adam(model.parameters(), eps=1e-3)
    model[0].grad = torch.tensor(g, dtype=torch.float64)
    average = torch.tensor(v, dtype=torch.float64)
    optimizer.state[model[0]] = {"step": torch.tensor(1e5), "exp_avg_sq": average, "exp_avg": average}
    return Loop(Built(model, nn.MSELoss(), (torch.ones(1), torch.ones(1))), [optimizer], {})


def test_a_stale_second_moment_shows() -> None:
    loop = fabricated([1.0, 1.0, 4.0, 0.0], [4.0, 1.0, 2.0, 7.0])
    rms, age, share = read(loop, Rms()), read(loop, SecondMomentAge()), read(loop, EpsilonShare())
    close(rms["rms"], math.sqrt((16 + 1 + 1) / 3))
    close(rms["unheard"], 0.25)
    close(age["median_ratio"], 1.0)
    close(age["far_share"], 1 / 3)
    close(age["averaging_length"], [1000.0])
    close(share["share"], 0.25)
    close(share["silent"], 0.25)


def test_nothing_ever_heard_and_gradients_that_are_not_finite() -> None:
    silent = read(fabricated([0.0, 0.0], [1.0, 0.0]), Rms())
    assert math.isnan(silent["rms"])
    assert math.isnan(silent["largest"])
    assert silent["unheard"] == 1
    assert math.isnan(read(fabricated([0.0], [1.0]), SecondMomentAge())["median_ratio"])
    broken = read(fabricated([1.0, 1.0], [math.nan, 1.0]), Rms())
    assert math.isnan(broken["rms"])
    assert math.isnan(broken["largest"])


def test_complex_parameters_are_refused() -> None:
    loop = fabricated([1.0], [1.0])
    loop.built.model[0].grad = None
    loop.built.model[0].data = loop.built.model[0].data.cfloat()
    with pytest.raises(Refusal, match="complex"):
        read(loop, Rms())


def test_half_precision_is_squared_in_full() -> None:
    """1e-5 squared is zero in float16: the ratio would be 0 / 0."""
    loop = fabricated([1e-6], [1e-5])
    model = loop.built.model
    model[0].grad = None
    model[0].data = model[0].data.half()
    model[0].grad = torch.tensor([1e-5]).half()
    assert float(read(loop, SecondMomentAge())["median_ratio"]) == pytest.approx(1e-4, rel=1e-2)


def test_the_median_of_a_sample_is_near_that_of_all() -> None:
    g = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).tolist()
    loop = fabricated([1.0] * 50_000, g)
    everything, some = (read(loop, SecondMomentAge(sample=n)) for n in (50_000, 2_000))
    assert float(some["median_ratio"]) == pytest.approx(float(everything["median_ratio"]), rel=0.15)
    assert float(some["median_ratio"]) != float(everything["median_ratio"])
    assert some["far_share"] == everything["far_share"]
    assert read(loop, SecondMomentAge(sample=2_000))["median_ratio"] == some["median_ratio"]


def test_stationary_noise_reads_one_and_the_median_of_chi_squared() -> None:
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.zeros(20_000))])
    optimizer = optim.Adam(model.parameters(), betas=(0.9, 0.99))
    for _ in range(300):
        model[0].grad = torch.randn(20_000)
        optimizer.step()
    model[0].grad = torch.randn(20_000)
    loop = Loop(Built(model, nn.MSELoss(), (torch.ones(1), torch.ones(1))), [optimizer], {})
    assert float(read(loop, Rms())["rms"]) == pytest.approx(1, abs=0.03)
    age = read(loop, SecondMomentAge())
    assert float(age["median_ratio"]) == pytest.approx(0.455, abs=0.02)
    assert float(age["far_share"]) == pytest.approx(0.0016, abs=0.001)
