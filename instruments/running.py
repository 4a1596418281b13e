"""The context of every forward of a reading: pinned randomness, full precision, differentiable kernels, and no graph
where none is needed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from instruments.guard import RandomStates

Mode = Literal["train", "eval"]
Found = TypeVar("Found")
NEEDS_GRAPH = "the loss needs a graph"


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile`, DistributedDataParallel or DataParallel."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


@contextmanager
def running(module: nn.Module, random: RandomStates, *, seed: int, mode: Mode, differentiable: bool) -> Iterator[None]:
    """Inside, a forward of `module` draws the random numbers of `seed` and runs without autocast, in eager mode.

    `random` holds the streams that are seeded.

    mode "train" keeps every module's flag as the user set it, "eval" switches all of them. `differentiable` asks for
    kernels that can be differentiated twice and vectorised: attention by plain matrix products (the fused kernels have
    no second derivative), recurrent layers without cuDNN. To be used inside `untouched`, which puts everything back.
    """
    device = next(module.parameters()).device.type
    with ExitStack() as stack:
        random.pin(seed)
        if mode == "eval":
            module.eval()
        stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if differentiable:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if device == "cuda" and any(isinstance(m, nn.RNNBase) for m in module.modules()):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def without_graph(plans: dict[Any, Any], forward: Callable[[], Found]) -> Found:
    """What `forward()` gives where no gradient is to be taken of it: without a graph, if the loss can do without.

    A loss that differentiates the model's output by its input itself (gradient penalties, physics-informed losses,
    score matching), or a model that does (forces from an energy), cannot: it is run again with a graph, and `plans`
    remembers that. Each run enters `running` anew, for the same random numbers and buffers.
    """
    if not plans.get(NEEDS_GRAPH, False):
        try:
            with torch.no_grad():
                return forward()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
    with torch.enable_grad():
        found = forward()
    plans[NEEDS_GRAPH] = True
    return found


SETTLED_BYTES = 31 * 2**20  # just below the largest block by which glibc moves its thresholds


def settle_heap() -> None:
    """Have the C library keep what is freed, up to 62 MiB, instead of giving it back to the system at every step.

    When tensors are let go and the top of the heap is free, glibc returns it, and the next step pays for the same pages
    again, with readings or without: a quarter of a plain step of a small CNN, a seventh of an observed one. Its
    thresholds follow the largest block that was mapped and freed: one that is never touched will do. Other C libraries
    do not mind.
    """
    torch.empty(SETTLED_BYTES, dtype=torch.uint8)


def processes() -> int:
    """How many processes train together."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1
