"""The wheel holds the three packages with their type markers, and nothing else."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"cockpit_bench", "instruments", "workloads"}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files in a wheel built from the tree as it is, without the network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_nothing_but_the_packages(names: list[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == PACKAGES | {info}
    assert f"{info}/licenses/LICENSE" in names
    assert f"{info}/entry_points.txt" in names


def test_every_module_is_in_it(names: list[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert modules - set(names) == set()
    assert [name for name in names if name.rpartition("/")[2].startswith(("test_", "conftest"))] == []
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_installed_metadata_has_loose_bounds() -> None:
    """Exact versions belong into constraints.txt: a library that pins torch cannot be installed beside another."""
    required = [line for line in metadata.requires("cockpit-bench") or [] if "extra ==" not in line]
    assert any(line.startswith("torch>=") for line in required)
    assert [line for line in required if "==" in line or line.startswith("torchvision")] == []
