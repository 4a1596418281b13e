"""One write per record, torn tails terminated, schema checked."""

import json
import os
import re
import threading
from pathlib import Path

import pytest

from cockpit_bench.runlog import (
    SCHEMA,
    Event,
    Follower,
    Header,
    LogWriter,
    Reading,
    SchemaError,
    encode,
    new_header,
    read_run,
)
from cockpit_bench.runlog.codec import parse_line
from cockpit_bench.runlog.header import encode_header, header_of


def reading(step: int) -> Reading:
    return Reading("gradient/norm", step, float(step), "ok", {"norm": float(step)})


def steps_in(path: Path) -> list[int]:
    return [record.step for record in Follower(path).poll()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_header_says_what_wrote_the_log() -> None:
    header = new_header("first", trial="abc", seeds=[1, 2])
    body = json.loads(encode_header(header))
    assert list(body["versions"]) == [
        "python",
        "cockpit-bench",
        "torch",
        "backpack-for-pytorch",
        "numpy",
        "scipy",
        "tensorboard",
        "scikit-learn",
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", body["created"])
    assert body["schema"] == SCHEMA
    assert header_of(parse_line(encode_header(header))) == header


@pytest.mark.parametrize("line", ['{"kind":"event"}', '{"kind":"header"}', '{"kind":"header","schema":"1"}'])
def test_a_line_that_is_no_header(line: str) -> None:
    with pytest.raises(ValueError, match="schema number"):
        header_of(parse_line(line))


def test_a_newer_schema_is_neither_read_nor_continued(path: Path) -> None:
    path.write_text(encode_header(Header("later", "2030", schema=SCHEMA + 1)) + "\n")
    for act in (lambda: Follower(path).poll(), lambda: LogWriter(path, new_header("x")), lambda: read_run(path.parent)):
        with pytest.raises(SchemaError, match=f"schema {SCHEMA + 1}.*upgrade"):
            act()
    assert len(path.read_bytes().splitlines()) == 1


def test_one_write_call_per_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(bytes(data)) or real(fd, data))
    writer = LogWriter(path, new_header("x"))
    for step in range(3):
        writer.write(reading(step))
    writer.close()
    assert calls[1:] == [encode(reading(step)).encode() + b"\n" for step in range(3)]
    assert b"".join(calls) == path.read_bytes()


def test_two_writers_do_not_mix_their_lines(path: Path) -> None:
    def work(offset: int) -> None:
        writer = LogWriter(path, new_header("x"))
        for step in range(offset, offset + 300):
            writer.write(reading(step))
        writer.close()

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    follower = Follower(path)
    assert sorted(record.step for record in follower.poll()) == list(range(600))
    assert follower.bad_lines == 0


@pytest.mark.parametrize("tail", ['{"kind":"reading","instr', '{"kind":"header","sch', "x", "\x00\x00"])
def test_a_torn_tail_is_terminated_not_truncated(path: Path, tail: str) -> None:
    if not tail.startswith('{"kind":"header"'):
        with_header = LogWriter(path, new_header("x"))
        with_header.write(reading(1))
        with_header.close()
    before = (path.read_bytes() if path.exists() else b"") + tail.encode()
    path.write_bytes(before)
    writer = LogWriter(path, new_header("x"))
    writer.write(reading(2))
    writer.close()
    assert path.read_bytes().startswith(before + b'\n{"kind":"header"')
    assert b"\n\n" not in path.read_bytes()
    follower = Follower(path)
    assert follower.poll()[-1].step == 2
    assert follower.bad_lines == 1
    assert follower.header is not None


def test_a_whole_tail_gets_no_empty_line(path: Path) -> None:
    for step in (1, 2):
        writer = LogWriter(path, new_header("x"))
        writer.write(reading(step))
        writer.close()
    assert b"\n\n" not in path.read_bytes()
    assert steps_in(path) == [1, 2]


def test_resume_with_superseded(path: Path) -> None:
    writer = LogWriter(path, new_header("x"))
    for step in range(10):
        writer.write(reading(step))
    writer.close()
    with path.open("ab") as handle:
        handle.write(b'{"kind":"read')
    writer = LogWriter(path, new_header("x"))
    writer.write(Event(6, 6.0, "superseded", {"from_step": 6}))
    for step in range(6, 9):
        writer.write(reading(step))
    writer.close()
    run = read_run(path.parent)
    assert run["gradient/norm"]["norm"].steps.tolist() == list(range(9))
    assert run.bad_lines == 1


@pytest.mark.parametrize(("interval", "expected"), [(0.0, 3), (3600.0, 0)])
def test_fsync_is_rationed(path: Path, monkeypatch: pytest.MonkeyPatch, interval: float, expected: int) -> None:
    writer = LogWriter(path, new_header("x"), sync_seconds=interval)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for step in range(3):
        writer.write(reading(step))
    assert len(synced) == expected
    writer.sync()
    assert len(synced) == expected + 1
    writer.close()
    writer.close()
    assert len(synced) == expected + 2


def test_close_gives_the_descriptor_back(path: Path) -> None:
    writer = LogWriter(path, new_header("x"))
    descriptor = writer._fd
    writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_writing_after_close_is_misuse(path: Path) -> None:
    writer = LogWriter(path, new_header("x"))
    writer.close()
    with pytest.raises(ValueError, match="after close"):
        writer.write(reading(1))
