"""Names of modules are in the file once and again when they change, and every reading that is read back has them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cockpit_bench.runlog import Event, Follower, LogWriter, Reading, Record, new_header
from cockpit_bench.runlog.modules import names_of

FIRST, SECOND = ["conv", "relu"], ["conv", "relu", "head"]


def reading(step: int, names: Any, label: str = "network/activation_scale", **facts: Any) -> Reading:
    return Reading(label, step, float(step), "ok", {"rms": [1.0] * 2}, provenance={**facts, "modules": names})


def write(path: Path, *records: Record) -> None:
    writer = LogWriter(path, new_header("mine"))
    for record in records:
        writer.write(record)
    writer.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [body for line in path.read_text().splitlines() if (body := json.loads(line))["kind"] != "header"]


def readings(records: list[Record]) -> list[Record]:
    return [record for record in records if isinstance(record, Reading)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


RECORDS = [
    reading(0, FIRST, mode="train"),
    reading(0, FIRST, "network/dead_units"),
    reading(1, FIRST),
    Reading("network/activation_scale", 2, 2.0, "failed", reason="broken"),
    reading(3, SECOND),
    reading(4, SECOND),
    reading(5, FIRST),
    reading(6, []),
    reading(6, FIRST, "network/dead_units"),
]


def test_names_are_written_when_they_change(path: Path) -> None:
    write(path, *RECORDS)
    said = [(body["step"], body["detail"]) for body in lines(path) if body["kind"] == "event"]
    scale, dead = "network/activation_scale", "network/dead_units"
    assert said == [
        (0, {"instrument": scale, "names": FIRST}),
        (0, {"instrument": dead, "names": FIRST}),
        (3, {"instrument": scale, "names": SECOND}),
        (5, {"instrument": scale, "names": FIRST}),
        (6, {"instrument": scale, "names": []}),
    ]
    counts = [body.get("provenance", {}).get("modules") for body in lines(path) if body["kind"] == "reading"]
    assert counts == [2, 2, 2, None, 3, 3, 2, 0, 2]


@pytest.mark.parametrize("polls", [1, 100])
def test_what_is_read_is_what_was_written(path: Path, polls: int) -> None:
    write(path, *RECORDS)
    whole = path.read_bytes()
    path.write_bytes(b"")
    follower, found = Follower(path), []
    for start in range(0, len(whole), len(whole) // polls + 1):
        with path.open("ab") as handle:
            handle.write(whole[start : start + len(whole) // polls + 1])
        found += follower.poll()
    assert readings(found) == RECORDS


def test_every_opening_of_a_log_says_them_anew(path: Path) -> None:
    """What a resumed run takes back may include the event."""
    write(path, reading(3, FIRST))
    write(path, Event(0, 0.0, "superseded", {"from_step": 0}), reading(0, FIRST), reading(1, FIRST))
    assert readings(Follower(path).poll()) == [reading(0, FIRST), reading(1, FIRST)]
    assert [body["step"] for body in lines(path) if body.get("name") == "modules"] == [3, 0]


def test_a_log_that_was_replaced_starts_without_names(path: Path) -> None:
    write(path, reading(0, FIRST))
    follower = Follower(path)
    follower.poll()
    path.unlink()
    write(path, reading(0, 2), replace(reading(1, 2), instrument="other/one"))
    assert [record.provenance["modules"] for record in follower.poll() if isinstance(record, Reading)] == [2, 2]
    assert follower.restarts == 1


def test_names_that_were_lost_leave_their_number(path: Path) -> None:
    write(path, *RECORDS[:3], reading(4, SECOND))
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in whole if '"modules","detail"' not in line or '"head"' not in line))
    assert readings(Follower(path).poll()) == [*RECORDS[:3], reading(4, 3)]


def test_names_that_could_not_be_written_are_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter(path, new_header("mine"))
    append = writer._append

    def full(_text: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(writer, "_append", full)
    with pytest.raises(OSError, match="disk full"):
        writer.write(reading(0, FIRST))
    monkeypatch.setattr(writer, "_append", append)
    writer.write(reading(1, FIRST))
    writer.close()
    assert readings(Follower(path).poll()) == [reading(1, FIRST)]


@pytest.mark.parametrize("names", [7, "conv", None, True])
def test_what_is_no_list_is_left_alone(path: Path, names: Any) -> None:
    write(path, reading(0, names))
    assert Follower(path).poll() == [reading(0, names)]


def test_entries_have_numbers_where_names_do_not_fit() -> None:
    assert names_of(reading(0, FIRST), 2) == FIRST
    for names in (SECOND, ["twice", "twice"], 2, None):
        assert names_of(reading(0, names), 2) == ["0", "1"]
    assert names_of(Reading("a/b", 0, 0.0, "ok"), 1) == ["0"]
