"""Which of the processes that train together this one is."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import distributed


@dataclass(frozen=True)
class Process:
    """`rank` counts from 0 to `count` - 1; a program that trains alone is 0 of 1."""

    rank: int
    count: int

    @property
    def writes(self) -> bool:
        """Whether it is the one that writes the run folder and talks to the user."""
        return self.rank == 0


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """From torch.distributed where it is initialised, else from RANK and WORLD_SIZE, which torchrun sets.

    Variables that are no rank (not whole numbers, or a rank outside the world) are passed over.
    """
    if distributed.is_available() and distributed.is_initialized():
        return Process(distributed.get_rank(), distributed.get_world_size())
    try:
        process = Process(int(environment["RANK"]), int(environment["WORLD_SIZE"]))
    except (KeyError, ValueError):
        return Process(0, 1)
    return process if 0 <= process.rank < process.count else Process(0, 1)
