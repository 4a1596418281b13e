"""A user's program that ends in several ways without closing its cockpit: python user_loop.py FOLDER ENDING."""

import os
import signal
import sys
import time
from collections.abc import Callable

from loop_cases import CASES, Training
from watching import watch


def main(folder: str, ending: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start its background jobs without it
    training = Training(CASES[0])
    cockpit = watch(training, logdir=folder, panel="light", sinks=None if ending == "forks" else ())
    training.run(5, cockpit.observe)
    if ending == "raises":
        raise ValueError("the user's own")
    if ending == "returns":
        return
    if ending == "forks":
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # should it hang
        training.run(2, cockpit.observe)
        if child == 0:
            with cockpit.evaluating() as log:
                log(accuracy=0.5)
            cockpit.log(tokens=1.0)
            cockpit.event("hello")
            cockpit.write_text("note.txt", "of the child")
            cockpit.save_checkpoint("last.pt")
        else:
            assert os.waitpid(child, 0)[1] == 0
        sys.exit(0)
    print("ready", flush=True)
    if ending == "waits in with":
        with cockpit:
            train_for_ever(training, cockpit.observe)
    train_for_ever(training, cockpit.observe)


def train_for_ever(training: Training, observe: Callable[..., None]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        training.run(1, observe)


if __name__ == "__main__":
    main(*sys.argv[1:])
