"""`cockpit-bench dash`: TensorBoard on the loopback address, with a link to the cockpit's charts. Imports no torch."""

import argparse
import json
import threading
from pathlib import Path

from cockpit_bench.runlog.folder import LOG

HOST = "127.0.0.1"


def call(arguments: argparse.Namespace) -> bool:
    """Serve until interrupted. Raises ValueError when there is no run to show, or the port is taken."""
    folder = Path(arguments.logdir)
    if not (folder / LOG).exists() and not any(folder.glob(f"*/{LOG}")):
        raise ValueError(f"expected a run folder or a folder of runs, got '{folder}', which holds no {LOG}")
    from tensorboard import program

    server = program.TensorBoard()
    server.configure(logdir=str(folder), host=HOST, port=arguments.port, reload_interval=2.0)
    try:
        url = server.launch()
    except program.TensorBoardServerException as error:
        raise ValueError(f"TensorBoard could not start: {error}; choose another --port (0 takes any)") from error
    address = f"{url}#custom_scalars"
    print(json.dumps({"url": address}) if arguments.json else f"{address}\npress Ctrl-C to stop", flush=True)
    try:
        threading.Event().wait()  # the server's own thread does not keep the program alive
    except KeyboardInterrupt:
        print()
    return False
