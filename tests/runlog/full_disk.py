"""Run by test_full_disk.py in a process of its own: fill the disk under a log, make room, go on, read back.

`rlimit` uses the kernel's limit on file size; `tmpfs` expects the folder to be a tiny file system.
"""

import resource
import signal
import sys
from pathlib import Path

from cockpit_bench.runlog import Follower, LogWriter, Reading, new_header

mode, folder = sys.argv[1], Path(sys.argv[2])
path, ballast = folder / "log.jsonl", folder / "ballast"


def record(step: int) -> Reading:
    return Reading("gradient/norm", step, 0.0, "ok", {"norm": 0.5}, provenance={"padding": "x" * 1500})


def fill() -> None:
    if mode == "rlimit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    else:
        ballast.write_bytes(b"x" * 30_000)


def make_room() -> None:
    if mode == "rlimit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        ballast.unlink()


fill()
writer = LogWriter(path, new_header("full"))
kept, lost, step = [], [], 0
while len(lost) < 3:
    try:
        writer.write(record(step))
        kept.append(step)
    except OSError:
        lost.append(step)
    step += 1
make_room()
for later in range(step, step + 5):
    writer.write(record(later))
    kept.append(later)
writer.close()

follower = Follower(path)
read = [found.step for found in follower.poll()]
assert read == kept, f"kept {kept} but read {read}"
assert follower.bad_lines == 1, f"{follower.bad_lines} torn lines, expected the one that the full disk cut"
