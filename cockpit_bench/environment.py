"""What a run ran on: versions, machine, device, commit."""

import os
import platform
import subprocess
import sys
from typing import Any

from cockpit_bench.runlog.header import installed_versions


def environment() -> dict[str, Any]:
    """Everything worth keeping beside a log. Asks nothing of the network, and no command fails a run."""
    import torch

    return {
        "versions": installed_versions(),
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "command": sys.argv,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the folder that the run was started in, with a mark if it has changes."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()
