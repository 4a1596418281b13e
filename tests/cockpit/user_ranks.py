"""One of two processes that train one model with one logdir: python user_ranks.py RANK STORE LOGDIR."""

import json
import sys

import torch
from loop_cases import Case, Training, mlp, rows
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from watching import readings

from cockpit_bench import Cockpit
from cockpit_bench.panels import PANELS

FULL = dict.fromkeys(PANELS["standard"], 1)


def main(rank: int, store: str, logdir: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    case = Case("ddp", lambda: DistributedDataParallel(mlp()), batch=lambda step: rows(2 * step + rank))
    training = Training(case)
    cockpit = Cockpit(training.model, training.optimizers, loss=case.loss, logdir=logdir, budget=None, panel=None,
                      instruments=FULL, probe=[rows(9)])  # fmt: skip
    training.run(3, cockpit.observe)
    with cockpit.evaluating() as log:
        log(accuracy=0.5)
    cockpit.save_checkpoint("last.pt")
    rows_priced = len(cockpit.prices().rows)
    outcome = cockpit.close()
    said = {
        "ok": len(readings(cockpit, status="ok")),
        "weights": [p.tolist() for p in training.model.parameters()],
        "status": outcome.status if outcome else None,
        "prices": rows_priced,
    }
    print(json.dumps(said))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
