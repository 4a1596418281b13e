"""Instruments by name: `family/file` is the module `instruments.family.file`; there is no other registration.

Listing reads file names and docstrings and imports nothing, so it is quick and needs no torch. Third parties add theirs
by an entry point of the group `cockpit_bench.instruments`, whose name is the instrument's name and whose value is the
class; or they pass an instance and need no name.
"""

import ast
import difflib
import importlib
import inspect
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instruments.instrument import Instrument

FAMILIES = ("batch", "curvature", "gradient", "network", "optimizer", "step")
GROUP = "cockpit_bench.instruments"


def builtin_names() -> list[str]:
    """`family/file` of every file in a family folder."""
    root = Path(__file__).parent
    files = [path for family in FAMILIES for path in (root / family).glob("*.py")]
    return sorted(f"{path.parent.name}/{path.stem}" for path in files if not path.stem.startswith("_"))


def third_party() -> dict[str, EntryPoint]:
    """Entry points by instrument name; none of them is imported."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def names() -> list[str]:
    """Every name that `make` understands."""
    return sorted({*builtin_names(), *third_party()})


def summary(name: str) -> str:
    """First line of the instrument's module docstring, read without importing it."""
    if name in builtin_names():
        path = Path(__file__).parent / f"{name}.py"
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or ""
        return doc.splitlines()[0] if doc else ""
    entry = third_party()[name]
    return f"third party: {entry.value}"


def make(name: str) -> "Instrument":
    """The instrument of that name with its default settings.

    Raises ValueError for an unknown name (nearest names given), and for an entry point that cannot be imported (with
    the reason: a broken package of somebody else is a message, not a crash).
    """
    if name in builtin_names():
        return _only_instrument(importlib.import_module("instruments." + name.replace("/", ".")))()
    entry = third_party().get(name)
    if entry is None:
        raise ValueError(f"expected the name of an instrument, got '{name}'; {nearest(name, names())}.")
    from instruments.instrument import Instrument

    try:
        cls = entry.load()
    except Exception as error:
        raise ValueError(f"instrument '{name}' ({entry.value}) cannot be imported: {error}") from error
    if not (inspect.isclass(cls) and issubclass(cls, Instrument)):
        raise ValueError(f"entry point '{name}' gave {cls!r}, expected a subclass of instruments.Instrument.")
    return cls()


MANY = 12  # names


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names what was probably meant, and all there is, if that is not much or nothing was near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else ""
    if close and len(known) > MANY:
        return f"{hint} cockpit-bench list names all {len(known)}"
    return f"{hint} known: {', '.join(known)}".lstrip()


def _only_instrument(module: object) -> "type[Instrument]":
    from instruments.instrument import Instrument

    name = getattr(module, "__name__", "")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Instrument) and value.__module__ == name
    ]
    if len(found) != 1:
        raise ValueError(f"expected exactly one instrument in {name}, got {[cls.__name__ for cls in found]}.")
    return found[0]
