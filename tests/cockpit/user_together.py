"""One of two processes that train one model and read its curvature together: python user_together.py RANK STORE."""

import json
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from loop_cases import Case, Training, mlp, rows
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from watching import readings

from cockpit_bench import Cockpit, Reading
from instruments.curvature.exact import ExactSpectrum
from instruments.curvature.preconditioned_sharpness import PreconditionedSharpness
from instruments.curvature.sharpness import Sharpness
from instruments.operators import ranks as together

SIZES = 12, 5
SUMMED = {
    "sharpness": Sharpness(tol=1e-4),
    "rho": PreconditionedSharpness(tol=1e-4),
    "hessian": ExactSpectrum(),
    "gauss_newton": ExactSpectrum(matrix="gauss_newton"),
}


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = rows(2 * step + rank)
    return x[: SIZES[rank]], y[: SIZES[rank]]


def told(reading: Reading) -> dict[str, Any]:
    values = {name: value for name, value in reading.values.items() if isinstance(value, float)}
    facts = {name: reading.provenance.get(name) for name in ("scope", "examples", "route")}
    return {"status": reading.status, "reason": reading.reason, **values, **facts}


class Losses:
    """Fails when it is told to."""

    broken = False

    def __call__(self, call: Any, batch: Any) -> Tensor:
        if self.broken:
            raise KeyError("planted")
        return F.cross_entropy(call(batch[0]), batch[1], reduction="none")


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    everybody, losses = distributed.group.WORLD, Losses()
    case = Case("ddp", lambda: DistributedDataParallel(mlp()), batch=lambda step: batch_of(step, rank), loss=losses)
    training = Training(case)
    cockpit = Cockpit(training.model, training.optimizers, loss=losses, budget=None, panel=None, sinks=[])
    training.run(3, cockpit.observe)
    cockpit.observe(*training.backward(3))
    mine = batch_of(3, rank)
    said: dict[str, Any] = {"weights": [p.tolist() for p in training.model.parameters()]}
    for name, instrument in SUMMED.items():
        said[name] = told(cockpit.read(instrument, mine, ranks=everybody))
    said["by name"] = told(cockpit.read("curvature/sharpness", mine, ranks=everybody))
    said["held"] = told(cockpit.read("curvature/sharpness", ranks=everybody))
    said["alone"] = told(cockpit.read(SUMMED["hessian"], mine))
    said["noise"] = told(cockpit.read("gradient/noise_scale", mine))
    said["noise together"] = told(cockpit.read("gradient/noise_scale", mine, ranks=everybody))
    said["different"] = told(cockpit.read(("curvature/sharpness", "curvature/smallest")[rank], mine, ranks=everybody))
    losses.broken = rank == 1
    said["broken"] = told(cockpit.read("curvature/sharpness", mine, ranks=everybody))
    losses.broken = rank == 0
    said["broken first"] = told(cockpit.read("curvature/sharpness", mine, ranks=everybody))
    losses.broken = False
    said["mended"] = told(cockpit.read("curvature/sharpness", mine, ranks=everybody))
    together.PATIENCE = timedelta(seconds=1)
    if rank == 0:
        said["missing"] = told(cockpit.read("curvature/sharpness", mine, ranks=everybody))
    said["logged"] = len(readings(cockpit, "curvature/sharpness"))
    cockpit.close()
    print(json.dumps(said))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
