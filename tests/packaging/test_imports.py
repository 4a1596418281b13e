"""What importing costs and what it does not ask for: no torch for the command line's help, no torchvision ever."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("cockpit-bench")
QUICK_SECONDS = 1.0
BROKEN_TORCHVISION = "raise RuntimeError('operator torchvision::nms does not exist')\n"
ABSENT_TORCHVISION = """\
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
sys.meta_path.insert(0, Absent())
"""
IMPORT_OURS = """\
import sys
import cockpit_bench, instruments, workloads
for package in (cockpit_bench, instruments):
    for name in package.HOME:
        getattr(package, name)
cockpit_bench.Cockpit
import backpack.extensions
import instruments.samples.backpack_engine
"""
TRAIN = """\
import torch
from torch import nn
torch.set_num_threads(1)
x, y = torch.randn(16, 4), torch.randint(2, (16,))
model, loss_fn = nn.Sequential(nn.Linear(4, 2)), nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters())
with cockpit_bench.Cockpit(model, optimizer, loss=loss_fn, panel="standard", strict=True, sinks=[]) as cockpit:
    loss = loss_fn(model(x), y)
    loss.backward()
    cockpit.observe((x, y), loss)
    optimizer.step()
    assert cockpit.last["gradient/noise_scale"]["sum_of_squared_norms"] > 0
assert "torchvision" not in sys.modules, "torchvision was imported"
"""


def python(code: str, *, path: Path | None = None, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, with a folder in front of its path."""
    preamble = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path is not None else ""
    command = [sys.executable, *options, "-c", preamble + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder with a torchvision that raises what a build for another torch raises."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN_TORCHVISION, encoding="utf-8")
    return tmp_path


def test_all_works_with_torchvision_broken(broken: Path) -> None:
    done = python(IMPORT_OURS + TRAIN, path=broken)
    assert done.returncode == 0, done.stderr


def test_all_works_with_torchvision_absent() -> None:
    done = python(ABSENT_TORCHVISION + IMPORT_OURS + TRAIN)
    assert done.returncode == 0, done.stderr


def test_the_stubs_do_what_they_are_for(broken: Path) -> None:
    assert "nms does not exist" in python("import torchvision", path=broken).stderr
    assert "No module named 'torchvision'" in python(ABSENT_TORCHVISION + "import torchvision").stderr


LIGHT = ["['--help']", "['run', '--help']", "['--version']", "['list']", "['list', 'instruments', '--json']"]
LIGHT_CODE = """\
import sys
from cockpit_bench.cli import main
try:
    main({arguments})
except SystemExit:
    pass
heavy = sorted({{"torch", "tensorboard", "matplotlib", "sklearn", "backpack"}} & sys.modules.keys())
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""


@pytest.mark.parametrize("arguments", LIGHT)
def test_help_and_list_import_no_torch(arguments: str) -> None:
    done = python(LIGHT_CODE.format(arguments=arguments))
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_an_import_of_torch_would_be_seen(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    done = python("import torch\n" + LIGHT_CODE.format(arguments="['list']"), path=tmp_path)
    assert "imported ['torch']" in done.stderr


def test_importing_the_package_imports_no_torch() -> None:
    done = python("import sys, cockpit_bench, instruments, workloads; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["list"]])
def test_the_command_answers_quickly(words: list[str]) -> None:
    """The best of three: a busy machine is slow for reasons of its own."""
    durations = []
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run([COMMAND, *words], capture_output=True, text=True, timeout=60, check=False)
        durations.append(time.perf_counter() - begun)
        assert done.returncode == 0, done.stderr
    print(f"cockpit-bench {' '.join(words)}: {min(durations):.3f} s")
    assert min(durations) < QUICK_SECONDS
