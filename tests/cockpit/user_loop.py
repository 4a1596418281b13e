"""A user's program that ends in several ways without closing its cockpit: python user_loop.py FOLDER ENDING."""

import signal
import sys
import time
from collections.abc import Callable

from loop_cases import CASES, Training
from watching import watch


def main(folder: str, ending: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start its background jobs without it
    training = Training(CASES[0])
    cockpit = watch(training, logdir=folder, panel="light")
    training.run(5, cockpit.observe)
    if ending == "raises":
        raise ValueError("the user's own")
    if ending == "returns":
        return
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
