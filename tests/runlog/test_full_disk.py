"""A full disk costs the records that did not fit, and nothing that comes after."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cockpit_bench.runlog import Follower, LogWriter, Reading, encode, new_header

SCRIPT = Path(__file__).with_name("full_disk.py")
# A mount namespace of its own: the file system goes when the script ends, and nobody else ever sees it.
MOUNT = 'mount -t tmpfs -o size=64k tmpfs "$1" && exec "$2" "$3" tmpfs "$1"'


def reading(step: int) -> Reading:
    return Reading("gradient/norm", step, 0.0, "ok", {"norm": 0.5})


def test_a_limit_on_the_file_size(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "rlimit", str(tmp_path)], check=True)


def test_a_tiny_file_system(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    private = [str(unshare), "--map-root-user", "--mount", "sh", "-c"]
    if (
        unshare is None
        or subprocess.run([*private, 'mount -t tmpfs tmpfs "$1"', "sh", tmp_path], check=False).returncode
    ):
        pytest.skip("no permission to mount a file system")
    subprocess.run([*private, MOUNT, "sh", tmp_path, sys.executable, SCRIPT], check=True)


@pytest.mark.parametrize("taken", range(len(encode(reading(1))) + 1))
def test_a_short_write_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    path = tmp_path / "log.jsonl"
    writer = LogWriter(path, new_header("x"))
    writer.write(reading(0))
    real = os.write
    for room in (taken, taken, 0):  # later failures may end the torn line, or not even that
        monkeypatch.setattr(os, "write", lambda fd, data, room=room: real(fd, data[:room]))
        with pytest.raises(OSError, match=r"the file took \d+; free some space") as caught:
            writer.write(reading(1))
        assert caught.value.errno == 28
    monkeypatch.setattr(os, "write", real)
    for step in (2, 3):
        writer.write(reading(step))
    writer.close()
    follower = Follower(path)
    steps = [record.step for record in follower.poll()]
    assert [step for step in steps if step != 1] == [0, 2, 3]
    assert follower.bad_lines + steps.count(1) <= 2


def test_a_write_that_raises_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    writer = LogWriter(path, new_header("x"))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    real = os.write
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write(reading(1))
    monkeypatch.setattr(os, "write", real)
    writer.write(reading(2))
    writer.close()
    assert b"\n\n" not in path.read_bytes()
    assert [record.step for record in Follower(path).poll()] == [2]


def test_no_room_even_for_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:10]))
    closed = []
    close = os.close
    monkeypatch.setattr(os, "close", lambda fd: closed.append(fd) or close(fd))
    with pytest.raises(OSError, match="free some space"):
        LogWriter(path, new_header("x"))
    assert closed
    monkeypatch.setattr(os, "write", real)
    writer = LogWriter(path, new_header("x"))
    writer.write(reading(1))
    writer.close()
    assert [record.step for record in Follower(path).poll()] == [1]
