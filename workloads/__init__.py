"""Training problems, one file each: data, model, loss, metric, target, budget.

A file in this folder that assigns a top-level WORKLOAD is a workload and is asked for by its file name; nothing is
registered elsewhere. Listing reads the files without importing them, so it costs no import of torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workloads.target import Target, at_least, at_most
    from workloads.workload import Data, Workload

__all__ = ["Data", "Target", "Workload", "at_least", "at_most", "get", "names", "summary_of"]

_HOME = {"Workload": "workload", "Data": "workload", "Target": "target", "at_least": "target", "at_most": "target"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workloads' has no attribute {name!r}")
    return getattr(importlib.import_module(f"workloads.{_HOME[name]}"), name)


def names() -> list[str]:
    """Names of all workloads in alphabetical order."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if _assigns_workload(path))


def summary_of(name: str) -> str:
    """First line of the workload's docstring. Raises ValueError for an unknown name."""
    _check(name)
    text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def get(name: str) -> Workload:
    """The workload of that name; imports its module. Raises ValueError for an unknown name."""
    _check(name)
    workload: Workload = importlib.import_module(f"workloads.{name}").WORKLOAD
    return workload


def _check(name: str) -> None:
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"expected the name of a workload, got {name!r}; {hint}known are: {', '.join(known)}")


def _assigns_workload(path: Path) -> bool:
    targets: list[ast.expr] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign):
            targets.append(node.target)
    return any(isinstance(target, ast.Name) and target.id == "WORKLOAD" for target in targets)
