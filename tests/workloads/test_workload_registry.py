"""The catalogue is read from the files: what it lists, what it imports, what it says to a wrong name."""

import subprocess
import sys

import pytest

import workloads


def test_listing_finds_the_files_that_assign_a_workload() -> None:
    assert workloads.names() == ["byte_lm", "digits_2c2d", "digits_mlp", "quadratic"]


@pytest.mark.parametrize("name", workloads.names())
def test_name_and_summary_agree_with_the_file(name: str) -> None:
    workload = workloads.get(name)
    assert isinstance(workload, workloads.Workload)
    assert workload.name == name
    assert workload.summary == workloads.summary_of(name) != ""


def test_listing_and_targets_cost_no_import_of_torch() -> None:
    script = (
        "import sys, workloads; workloads.names(); workloads.summary_of('byte_lm'); workloads.at_least('a', 1.0);"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_no_workload_imports_torchvision() -> None:
    script = (
        "import sys; sys.modules['torchvision'] = None; import workloads;"
        "[workloads.get(name) for name in workloads.names()]"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("ask", [workloads.get, workloads.summary_of])
def test_unknown_names_are_answered_with_the_nearest_and_all(ask: object) -> None:
    with pytest.raises(ValueError, match="did you mean digits_mlp") as error:
        ask("digit_mlp")  # type: ignore[operator]
    assert all(name in str(error.value) for name in workloads.names())
    with pytest.raises(ValueError, match="got 'workload'"):
        ask("workload")  # type: ignore[operator]


def test_unknown_attributes_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="Workloads"):
        workloads.Workloads  # noqa: B018
