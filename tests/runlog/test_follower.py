"""Following a log that grows, is replaced, shrinks, or is continued from an earlier step."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cockpit_bench.runlog import Event, Follower, Outcome, Reading, Record, current, encode, new_header
from cockpit_bench.runlog.header import encode_header

OUTCOME = Outcome("interrupted", 2, 2.0, None, None, None, "", {}, 2.0, {})


def reading(step: int, value: float = 0.0) -> Reading:
    return Reading("gradient/norm", step, float(step), "ok", {"norm": value})


def superseded(from_step: int) -> Event:
    return Event(from_step, float(from_step), "superseded", {"from_step": from_step})


def lines(*records: Record) -> bytes:
    return "".join(encode(record) + "\n" for record in records).encode()


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as handle:
        handle.write(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_waits_for_the_file_and_for_whole_lines(path: Path) -> None:
    follower = Follower(path)
    assert follower.poll() == []
    header = encode_header(new_header("mine")).encode() + b"\n"
    whole = header + lines(reading(1), reading(2))
    for at in range(len(whole)):
        append(path, whole[at : at + 1])
        expected = [reading(1)] if at == len(header + lines(reading(1))) - 1 else []
        expected = [reading(2)] if at == len(whole) - 1 else expected
        assert follower.poll() == expected
    assert follower.header is not None
    assert follower.header.run == "mine"
    assert follower.bad_lines == 0


def test_bad_lines_are_counted_and_passed_over(path: Path) -> None:
    append(path, lines(reading(1)) + b"\x80\n\n{]\n" + b'{"kind":"hologram"}\n' + lines(reading(2)) + b'{"torn')
    follower = Follower(path)
    assert follower.poll() == [reading(1), reading(2)]
    assert follower.bad_lines == 2
    append(path, b"\nworse\n")
    assert follower.poll() == []
    assert follower.bad_lines == 4


def test_a_file_that_shrank_is_read_again(path: Path) -> None:
    many = [reading(step) for step in range(9)]
    append(path, lines(*many) + b"bad\n")
    follower = Follower(path)
    follower.poll()
    path.write_bytes(lines(*many[:5]))
    assert follower.poll() == many[:5]
    assert (follower.restarts, follower.bad_lines) == (1, 0)


def test_a_replaced_file_is_read_again_however_long(path: Path, tmp_path: Path) -> None:
    append(path, lines(reading(1)))
    follower = Follower(path)
    follower.poll()
    other = tmp_path / "other"
    other.write_bytes(lines(reading(1), reading(8), reading(9)))
    other.replace(path)
    assert follower.poll() == [reading(1), reading(8), reading(9)]
    assert follower.restarts == 1


def test_a_new_file_on_the_same_inode_is_noticed(path: Path) -> None:
    append(path, encode_header(new_header("old")).encode() + b"\n" + lines(reading(1)))
    follower = Follower(path)
    follower.poll()
    with path.open("r+b") as handle:
        handle.truncate()
        handle.write(encode_header(new_header("new")).encode() + b"\n" + lines(reading(5), reading(6)))
    assert follower.poll() == [reading(5), reading(6)]
    assert follower.header is not None
    assert follower.header.run == "new"


def test_the_first_header_is_the_run_s(path: Path) -> None:
    for run in ("first", "second"):
        append(path, encode_header(new_header(run)).encode() + b"\n")
    follower = Follower(path)
    follower.poll()
    assert follower.header is not None
    assert follower.header.run == "first"


def test_superseded_takes_back_what_was_written_before_it() -> None:
    records: list[Record] = [reading(1), reading(2), OUTCOME, reading(3), superseded(2), reading(2, 9.0)]
    assert current(records) == [reading(1), superseded(2), reading(2, 9.0)]


def test_an_earlier_outcome_never_survives_a_resume() -> None:
    assert current([OUTCOME, superseded(2)]) == [superseded(2)]
    assert current([OUTCOME, superseded(100)]) == [superseded(100)]
    assert current([superseded(0), OUTCOME]) == [superseded(0), OUTCOME]


def test_a_superseded_event_without_its_step_takes_back_nothing() -> None:
    odd = Event(0, 0.0, "superseded", {"from": 0})
    assert current([reading(1), odd]) == [reading(1), odd]


steps = st.integers(0, 5)
histories = st.lists(steps.map(reading) | steps.map(superseded) | st.just(OUTCOME), max_size=20)


@settings(deadline=None)
@given(histories, st.lists(st.integers(0, 20), max_size=4))
def test_polling_in_pieces_gives_the_same(records: list[Record], cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(records)]
    joined: list[Record] = []
    for start, stop in itertools.pairwise(bounds):
        joined = current(joined + current(records[start:stop]))
    assert joined == current(records)


@settings(deadline=None)
@given(histories)
def test_current_agrees_with_its_definition(records: list[Record]) -> None:
    def counts(index: int, record: Record) -> bool:
        if isinstance(record, Event):
            return True
        later = [other.step for other in records[index + 1 :] if isinstance(other, Event)]
        return not later or (record.step < min(later) and not isinstance(record, Outcome))

    assert current(records) == [record for index, record in enumerate(records) if counts(index, record)]
