"""What a sink is."""

from abc import ABC, abstractmethod

from cockpit_bench.runlog import Record


class Sink(ABC):
    """Abstract: takes the records of a run one by one, in the order they happen.

    A sink may raise; whoever feeds it decides what then happens (see `Fanout`).
    """

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take one record."""

    @abstractmethod
    def close(self) -> None:
        """Finish; nothing is written afterwards. A second call does nothing."""
