"""Every instrument of the catalogue on every covering case, all at once: the promises of the cockpit."""

import re

import pytest

from cockpit_bench.testing.cases import COVERING_CASES
from cockpit_bench.testing.conformance import examine, examine_alone, examine_divergence
from cockpit_bench.testing.runs import quickened
from cockpit_bench.testing.training import Case
from instruments import catalogue

EVERYTHING = {name: quickened(catalogue.make(name)) for name in catalogue.builtin_names()}
ALL = frozenset(case.name for case in COVERING_CASES)
BY_NAME = {case.name: case for case in COVERING_CASES}

SGD = frozenset(
    {
        "mlp", "momentum, clipped", "batch norm", "group norm", "embedding", "squared error", "one number",
        "accumulation", "double precision",
    }
)  # fmt: skip
MIXED_OR_ONE = frozenset({"batch norm", "one number"})
NO_CLASSES = frozenset({"squared error", "binary", "custom loss"})
NO_MOMENT = "expected an optimizer whose second moment is known"
NO_EXAMPLES = r"per-example gradients are not defined|the loss is a single number"

REFUSALS: dict[str, tuple[frozenset[str], str]] = {
    "batch/example_loss": (frozenset({"one number"}), "the loss is a single number"),
    "batch/label_counts": (NO_CLASSES, "expected integer labels"),
    "curvature/tic": (MIXED_OR_ONE, NO_EXAMPLES),
    "gradient/coherence": (MIXED_OR_ONE, NO_EXAMPLES),
    "gradient/early_stopping": (MIXED_OR_ONE, NO_EXAMPLES),
    "gradient/example_histogram": (MIXED_OR_ONE, NO_EXAMPLES),
    "gradient/gradient_tests": (MIXED_OR_ONE, NO_EXAMPLES),
    "gradient/noise_scale": (MIXED_OR_ONE, NO_EXAMPLES),
    "gradient/signal_to_noise": (MIXED_OR_ONE, NO_EXAMPLES),
    "gradient/suggested_batch": (ALL - SGD | MIXED_OR_ONE, f"expected torch's SGD|{NO_EXAMPLES}"),
    "network/attention_logits": (ALL - {"tied attention", "encoder layer"}, "no attention was seen"),
    "network/dead_units": (frozenset({"layer norm", "tied attention", "recurrent"}), "no activation that can be dead"),
    "network/normalisation_statistics": (ALL - {"batch norm", "batch norm in eval mode"}, "no batch normalisation"),
    "optimizer/epsilon_share": (SGD, NO_MOMENT),
    "optimizer/rms": (SGD, NO_MOMENT),
    "optimizer/second_moment_age": (SGD, NO_MOMENT),
    "step/alpha": (MIXED_OR_ONE, NO_EXAMPLES),
}
"""Which instruments refuse which cases, and how the reason begins: a refusal that is not here is a fault."""


def test_the_table_names_what_there_is() -> None:
    assert set(REFUSALS) <= set(EVERYTHING)
    assert all(cases <= ALL and cases for cases, _ in REFUSALS.values())


@pytest.mark.parametrize("case", COVERING_CASES, ids=lambda case: case.name)
def test_all_at_once(case: Case) -> None:
    """Training unchanged, values as declared, two runs equal, saved and loaded, refusals as in the table."""
    found = examine(EVERYTHING, case)
    assert found.faults == {}
    assert set(found.refusals) == {name for name, (cases, _) in REFUSALS.items() if case.name in cases}
    for name, reason in found.refusals.items():
        assert re.search(REFUSALS[name][1], reason), (name, reason)


@pytest.mark.parametrize("name", EVERYTHING)
def test_alone(name: str) -> None:
    """Every need is used, and the price is what was counted."""
    refused, _ = REFUSALS.get(name, (frozenset(), ""))
    assert examine_alone(catalogue.make(name), [case for case in COVERING_CASES if case.name not in refused]) == []


@pytest.mark.parametrize("name", ["batch norm", "encoder layer"])
def test_a_run_that_diverges_is_seen_through(name: str) -> None:
    assert examine_divergence(EVERYTHING, BY_NAME[name]) == {}
