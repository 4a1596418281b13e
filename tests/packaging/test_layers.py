"""The arrow cockpit_bench -> instruments, workloads -> torch, read from the source: no import points the other way."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "cockpit_bench": {"torchvision"},
    "instruments": {"cockpit_bench", "workloads", "torchvision"},
    "workloads": {"cockpit_bench", "instruments", "torchvision"},
}

IMPORTERS = ("import_module", "__import__")


def imported(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, inside functions and by `import_module("...")` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, package if node.level else (node.module or "")
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith(IMPORTERS):
            yield node.lineno, _leading_text(node.args[0])


def _leading_text(name: ast.expr) -> str:
    """The beginning of a text or an f-string, as far as it is known."""
    while isinstance(name, ast.BinOp):
        name = name.left
    if isinstance(name, ast.JoinedStr) and name.values:
        name = name.values[0]
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""


def wrong_arrows(root: Path) -> list[str]:
    """`file:line imports module` for every import that the layers do not allow."""
    return [
        f"{path.relative_to(root)}:{line} imports {module}"
        for package, forbidden in FORBIDDEN.items()
        for path in sorted((root / package).rglob("*.py"))
        for line, module in imported(path, package)
        if module.partition(".")[0] in forbidden
    ]


def test_imports_point_downwards() -> None:
    assert wrong_arrows(ROOT) == []


def test_the_source_is_read() -> None:
    seen = {module for path in (ROOT / "cockpit_bench").rglob("*.py") for _, module in imported(path, "cockpit_bench")}
    assert {"instruments", "workloads", "torch"} <= {module.partition(".")[0] for module in seen}


PLANTS = {
    "instruments/gradient/planted.py": "from cockpit_bench.clock import Clock",
    "instruments/linalg/planted.py": "def late():\n    import workloads.target",
    "workloads/planted.py": "from importlib import import_module\nmodule = import_module('instruments.probe')",
    "workloads/data/planted.py": "import importlib\nmodule = importlib.import_module(f'cockpit_bench.{1}')",
    "cockpit_bench/sinks/planted.py": "from torchvision import transforms",
}


@pytest.mark.parametrize("place", PLANTS)
def test_a_planted_import_is_seen(place: str, tmp_path: Path) -> None:
    for package in FORBIDDEN:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert wrong_arrows(tmp_path) == []
    (tmp_path / place).write_text(PLANTS[place] + "\n", encoding="utf-8")
    (wrong,) = wrong_arrows(tmp_path)
    assert wrong.startswith(place)
