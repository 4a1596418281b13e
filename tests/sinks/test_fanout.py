"""A sink that fails is switched off once, the others hear of it, training goes on."""

import pytest

from cockpit_bench.runlog import Event, Reading, Record
from cockpit_bench.sinks import Fanout, MemorySink, Sink

FIRST, SECOND = (Reading("gradient/norm", step, float(step), "ok") for step in (1, 2))


class Broken(Sink):
    """Raises on writing what it is told to, and on closing."""

    def __init__(self, breaks_on: type[Record] = Reading) -> None:
        self.breaks_on = breaks_on
        self.calls: list[str] = []

    def write(self, record: Record) -> None:
        self.calls.append("write")
        if isinstance(record, self.breaks_on):
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        self.calls.append("close")
        raise RuntimeError("cannot close either")


@pytest.mark.parametrize("position", [0, 1])
def test_a_failing_sink_is_switched_off_once(position: int) -> None:
    broken, memory, messages = Broken(), MemorySink(), list[str]()
    sinks: list[Sink] = [memory]
    sinks.insert(position, broken)
    fanout = Fanout(sinks, messages.append)
    fanout.write(FIRST)
    fanout.write(SECOND)
    detail = {"sink": "Broken", "error": "OSError: [Errno 28] No space left on device"}
    assert memory.records == [FIRST, Event(1, 1.0, "sink_disabled", detail), SECOND]
    assert broken.calls == ["write", "close"]
    assert len(messages) == 1
    assert "Broken failed and is switched off, training goes on. OSError" in messages[0]
    assert fanout.sinks == (memory,)


def test_one_that_fails_on_the_news_of_another() -> None:
    memory, messages = MemorySink(), list[str]()
    fanout = Fanout([Broken(), Broken(Event), memory], messages.append)
    fanout.write(FIRST)
    assert len(messages) == 2
    assert [type(record).__name__ for record in memory.records] == ["Reading", "Event", "Event"]


def test_all_may_fail() -> None:
    messages = list[str]()
    fanout = Fanout([Broken(), Broken()], messages.append)
    fanout.write(FIRST)
    fanout.write(SECOND)
    assert len(messages) == 2


def test_closing_closes_all_and_never_raises() -> None:
    closed = []

    class Polite(Broken):
        def close(self) -> None:
            closed.append(self)

    messages = list[str]()
    Fanout([Broken(), Polite()], messages.append).close()
    assert len(closed) == 1
    assert len(messages) == 1
    assert "cannot close either" in messages[0]


def test_a_sink_may_join_later_or_fail_to() -> None:
    memory, messages = MemorySink(), list[str]()
    fanout = Fanout([], messages.append)
    fanout.write(FIRST)
    fanout.add(lambda: memory)
    fanout.add(lambda: MemorySink(limit=-1))
    fanout.write(SECOND)
    assert memory.records == [SECOND]
    assert messages == ["cockpit: a sink cannot be opened, training goes on. ValueError: maxlen must be non-negative"]


def test_an_interrupt_is_not_a_failure() -> None:
    class Interrupted(MemorySink):
        def write(self, record: Record) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Fanout([Interrupted()]).write(FIRST)


def test_the_message_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Fanout([Broken()]).write(FIRST)
    assert "cockpit: Broken failed" in capsys.readouterr().err
