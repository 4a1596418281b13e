"""A user's own `instruments` or `workloads` that comes first on the path is named when cockpit_bench is imported."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT = "import sys\nimport cockpit_bench\nprint('torch' in sys.modules)\n"


def run(script: Path, *, path: Path | None = None) -> str:
    """Run a user's script and return what it says on stderr; it must end well and import no torch."""
    environment = {"PYTHONPATH": str(path)} if path is not None else None
    options = [] if path is None else ["-S"]  # -S: without site-packages, hence without the installed packages
    command = [sys.executable, *options, str(script)]
    done = subprocess.run(
        command, cwd=script.parent, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    return done.stderr


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "users"
    folder.mkdir()
    (folder / "train.py").write_text(IMPORT, encoding="utf-8")
    return folder / "train.py"


@pytest.fixture(params=["source checkout", "wheel"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """None: as installed for development. A folder: what a wheel unpacks to, the only one on the path."""
    if request.param == "source checkout":
        return None
    site = tmp_path / "site"
    for package in ("cockpit_bench", "instruments", "workloads"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    return site


def plant(script: Path, name: str, kind: str) -> Path:
    planted = script.parent / (f"{name}.py" if kind == "file" else f"{name}/__init__.py")
    planted.parent.mkdir(exist_ok=True)
    planted.touch()
    return planted


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("name", ["instruments", "workloads"])
def test_what_was_found_and_what_was_expected(script: Path, path: Path | None, name: str, kind: str) -> None:
    planted = plant(script, name, kind)
    said = run(script, path=path)
    assert said.count("RuntimeWarning") == 1
    assert f"train.py:2: RuntimeWarning: cockpit_bench needs its own package '{name}'" in said
    assert f"expected at {(path or ROOT) / name}," in said
    assert f"finds {planted} first. Rename that" in said


def test_nothing_is_said_where_nothing_is_wrong(script: Path, path: Path | None) -> None:
    assert run(script, path=path) == ""


def test_a_folder_that_is_no_package_shadows_nothing(script: Path) -> None:
    """Python prefers a package anywhere on the path to a folder without __init__.py."""
    (script.parent / "instruments").mkdir()
    assert run(script) == ""


def test_a_module_that_was_imported_before(script: Path) -> None:
    plant(script, "workloads", "file")
    code = "import sys, workloads\nsys.path.pop(0)\nimport cockpit_bench\nprint('torch' in sys.modules)\n"
    script.write_text(code, encoding="utf-8")
    assert "train.py:3: RuntimeWarning: cockpit_bench needs its own package 'workloads'" in run(script)


def test_from_a_link_and_from_an_archive(script: Path, tmp_path: Path) -> None:
    """Paths are compared where they lead to."""
    linked, archive = tmp_path / "linked", tmp_path / "all.zip"
    linked.symlink_to(ROOT, target_is_directory=True)
    assert run(script, path=linked) == ""
    with zipfile.ZipFile(archive, "w") as packed:
        for package in ("cockpit_bench", "instruments", "workloads"):
            for file in (ROOT / package).rglob("*.py"):
                packed.write(file, file.relative_to(ROOT))
    assert run(script, path=archive) == ""
