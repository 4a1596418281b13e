"""What the layers give on the step's batch, by one more forward without gradients.

Shapes: N = examples of the step.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from instruments.objective import tensors_of
from instruments.running import Found, without_graph

if TYPE_CHECKING:
    from instruments.probe import Probe

OUTPUT = ""
"""The key of the model's own output among the activations."""


class Activations(dict[str, list[Tensor]]):
    """Outputs by the name of the layer, a list because a layer may be called several times and the step may have
    several micro-batches; under `OUTPUT` what the model itself gives, and in `output_type` the name of its type."""

    output_type = ""


def run_forward(probe: "Probe", watch: Callable[[], AbstractContextManager[Found]]) -> Found:
    """One forward of the step's batches through model and loss inside `watch()`, under the step's own masks.

    Gives what `watch()` was entered as, which a forward that fails may have filled in part: it is made anew for each.
    """

    def forward() -> Found:
        with probe.running(held=False, differentiable=True), watch() as seen:
            for batch in probe.batches:
                probe.objective.parts(probe.module, batch)
        return seen

    return without_graph(probe.plans, forward)


def read_activations(probe: "Probe") -> Activations:
    """The tensors that every layer without layers inside gave, and the output of the model."""
    return run_forward(probe, lambda: _recording(probe.module))


@contextmanager
def _recording(model: nn.Module) -> Iterator[Activations]:
    seen = Activations()
    handles = []
    for name, module in model.named_modules():
        if name == OUTPUT or not any(True for _ in module.children()):

            def keep(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                if name == OUTPUT:
                    seen.output_type = type(output).__name__
                found = tensors_of(output)
                # A copy: what follows may write into it (ReLU(inplace=True), a residual connection by +=).
                seen.setdefault(name, []).extend(leaf.detach().clone() for leaf in found[:1])

            handles.append(module.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
