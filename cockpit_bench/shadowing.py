"""Whether a file or folder of the user's takes the place of `instruments` or `workloads`. Imports none of them."""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("instruments", "workloads")


def warn_of_shadows() -> None:
    """One warning for each of the two packages that Python would take from somewhere else than beside this one.

    They are installed at the top level, so a script with a folder `instruments` of its own beside it imports that one.
    """
    for name in PACKAGES:
        expected, found = Path(__file__).resolve().parents[1] / name / "__init__.py", origin(name)
        if found is not None and found.resolve() != expected:
            warnings.warn(
                f"cockpit_bench needs its own package '{name}', expected at {expected.parent}, but Python finds "
                f"{found} first. Rename that, or start Python where it is not on sys.path; otherwise cockpit_bench "
                "imports the wrong modules and fails",
                RuntimeWarning,
                stacklevel=3,
            )


def origin(name: str) -> Path | None:
    """The file that `import name` runs or has run; None where nothing would be found."""
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
    else:
        spec = find_spec(name)
        file = None if spec is None else spec.origin
    return None if file is None else Path(file)
