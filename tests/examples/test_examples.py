"""The examples run as a user would run them, shortened, and stay short enough to be read."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGEST = {"wrap_a_loop.py": 40, "third_party_optimizer.py": 110}


def run(script: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), "--smoke", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout.lower()
    assert len(done.stdout.splitlines()) >= 4
    assert len(script.read_text(encoding="utf-8").splitlines()) <= LONGEST.get(script.name, 90)
    assert list(tmp_path.iterdir()) == []  # an example leaves nothing behind unless asked to


def test_the_spectra_are_drawn_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "spectra.png"
    monkeypatch.setattr(sys, "argv", ["spectrum_with_batchnorm.py", "--smoke", "--picture", str(picture)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "spectrum_with_batchnorm.py"), run_name="__main__")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_broken_example_is_seen(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('not like this')\n", encoding="utf-8")
    assert run(broken, tmp_path).returncode == 1
