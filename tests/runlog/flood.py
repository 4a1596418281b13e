"""Run by test_kill.py: writes records as fast as it can, and tells on stdout which are complete."""

import os
import sys

import numpy as np

from cockpit_bench.runlog import LogWriter, Reading, new_header

path, first = sys.argv[1], int(sys.argv[2])
big = np.arange(20_000.0)
writer = LogWriter(path, new_header("flood"), sync_seconds=0.01)
for step in range(first, first + 1_000_000):
    values = {"norm": 0.1 * step, "histogram": big if step % 7 == 0 else [1, 2, 3]}
    writer.write(Reading("gradient/norm", step, 0.0, "ok", values))
    os.write(1, step.to_bytes(8, "little"))
