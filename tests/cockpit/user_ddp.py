"""One of two processes that train one model together: python user_ddp.py RANK STORE; prints what the cockpit says."""

import json
import sys
from typing import Any

import torch
from loop_cases import Case, Training, mlp, rows
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from watching import readings, watch

from cockpit_bench import Event


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    case = Case("ddp", lambda: DistributedDataParallel(mlp()), batch=lambda step: rows(2 * step + rank))
    training = Training(case)
    cockpit = watch(training)
    training.run(3, cockpit.observe)
    cockpit.close()
    events = [record for record in cockpit.records if isinstance(record, Event)]
    said: dict[str, Any] = {
        "events": [[e.name, e.detail["reason"]] for e in events if "reason" in e.detail and e.name != "retired"],
        "ok": sorted({r.instrument for r in readings(cockpit, status="ok")}),
        "weights": [p.tolist() for p in training.model.parameters()],
    }
    print(json.dumps(said))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
