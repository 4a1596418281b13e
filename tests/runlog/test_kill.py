"""SIGKILL at any moment costs at most the record being written."""

import random
import subprocess
import sys
import time
from pathlib import Path

from cockpit_bench.runlog import Follower

KILLS = 50
FLOOD = Path(__file__).with_name("flood.py")


def acknowledged(path: Path, first: int, delay: float) -> list[int]:
    """Start the flood, kill it `delay` after its first record, and return the records it saw through."""
    process = subprocess.Popen([sys.executable, str(FLOOD), str(path), str(first)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    told = process.stdout.read(8)
    time.sleep(delay)
    process.kill()
    told += process.stdout.read()
    process.wait()
    process.stdout.close()
    return [int.from_bytes(told[at : at + 8], "little") for at in range(0, len(told), 8)]


def test_a_killed_run_loses_at_most_the_record_being_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    follower = Follower(path)
    dice = random.Random(1)
    first = 0
    for kill in range(KILLS):
        told = acknowledged(path, first, dice.uniform(0, 0.02))
        read = [record.step for record in follower.poll()]
        assert read[: len(told)] == told == list(range(first, first + len(told))), f"lost records at kill {kill}"
        assert len(read) - len(told) in (0, 1)
        first = read[-1] + 1
    assert follower.bad_lines <= KILLS
