"""Units that never fire, and units that are stuck at the end of their range.

Shapes: N = examples of the step, U = units of one activation, M = activations.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from instruments.instrument import Gauge, Output, Values
from instruments.network._calls import Call, Calls, shown, together
from instruments.objective import examples_of
from instruments.refusal import Refusal
from instruments.view import Need, View

TANH, SIGMOID = 0.97, (0.03, 0.97)
RECTIFIERS = frozenset({"relu", "threshold", "hardtanh", "hardswish", "clamp", "clamp_min"})
SQUASHERS = frozenset({"tanh", "sigmoid"})
CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class DeadUnits(Gauge):
    """Share of units that are zero on every example and position of the batch, and of units that are saturated on all.

    Read are the operators themselves, whether a module or a function calls them: relu, relu6, hardtanh and clamp with
    the lower end 0, threshold to 0 and hardswish can be dead; tanh beyond 0.97 in size and sigmoid outside
    (0.03, 0.97) are saturated. GELU, SiLU, ELU and leaky ReLU are never exactly zero and are not read, nor are the
    gates inside recurrent layers. An activation is named after the layer with parameters that returned last before it:
    "conv1.relu" are the units of conv1.

    A unit is a channel: dimension 1 of what follows a convolution, batch, group or instance normalisation, as long as
    that dimension still has its channels; the last dimension after a linear, embedding, layer normalisation, attention
    or recurrent layer; otherwise dimension 1 of four dimensions or more and the last of fewer. Behind a flattened
    convolution every position is a unit. Calls with the same name, and micro-batches, are read as one.

    A unit that is zero in N examples may still fire in others: with 95 % confidence in less than the share `bound`,
    1 - 0.05^(1/N), about 3/N. With few examples sparse units look dead. In training mode the reading is of the batch
    under its dropout and batch statistics. Dead units follow from a step that was too large, from inputs that are not
    scaled and from gradients that were not zeroed as well as from a bad start: look for the cause before changing the
    activation. An activation with outputs that are NaN has NaN shares, and so has the total that it is part of. At most
    200 activations are listed; the totals are over all.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "dead": Output("1", "share of dead units among all units that can be; NaN without any"),
        "saturated": Output("1", "share of always saturated units among all of tanh and sigmoid; NaN without any"),
        "bound": Output("1", "share of examples that a dead unit may fire on, at 95 % confidence: about 3/N"),
        "dead_units": Output("1", "share of dead units of each activation; NaN for tanh and sigmoid", "per-module"),
        "saturated_units": Output("1", "share of units saturated on the whole batch; NaN for others", "per-module"),
        "saturation": Output("1", "share of all outputs that are saturated; NaN for others", "per-module"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"forward", "batch"})
    reference: ClassVar[str] = "Lu et al. 2019, Dying ReLU and Initialization; Glorot and Bengio 2010 for saturation"

    def price(self, view: View) -> float:
        return 0.5

    def read(self, view: View) -> Values:
        units = view.forward(lambda: together(view.layout, _Activations))
        if not units.found:
            raise Refusal(
                "the forward calls no activation that can be dead or saturated (relu, hardtanh, threshold, hardswish, "
                "clamp at 0, tanh, sigmoid); recurrent layers are not read inside."
            )
        names, kinds = list(units.found), list(units.found.values())
        nan = math.nan
        stuck = [k.stuck_U.double().masked_fill(k.broken, nan) for k in kinds]
        share_M = torch.stack([u.mean() for u in stuck])
        squashes_M = torch.tensor([k.squashes for k in kinds], device=share_M.device)
        saturation_M = torch.stack([(k.count.double() / k.numel).masked_fill(k.broken, nan) for k in kinds])
        examples = sum(map(examples_of, view.batches))
        listed = shown(names)
        view.meter.provenance["modules"] = [names[i] for i in listed]
        return {
            "dead": _mean([u for u, k in zip(stuck, kinds, strict=True) if not k.squashes]),
            "saturated": _mean([u for u, k in zip(stuck, kinds, strict=True) if k.squashes]),
            "bound": 1 - 0.05 ** (1 / examples) if examples else math.nan,
            "dead_units": share_M.where(~squashes_M, nan)[listed],
            "saturated_units": share_M.where(squashes_M, nan)[listed],
            "saturation": saturation_M.where(squashes_M, nan)[listed],
        }


def _mean(pieces: list[Tensor]) -> Tensor | float:
    return torch.cat(pieces).mean() if pieces else math.nan


@dataclass
class _Units:
    """One activation: which units were stuck in every call, how many outputs of how many were, and whether any was NaN,
    which is neither."""

    squashes: bool
    stuck_U: Tensor
    count: Tensor
    numel: int
    broken: Tensor


class _Activations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operator that rectifies or squashes, by the layer before it."""

    supports_higher_order_operators = True

    def __init__(self, calls: Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls
        self.found: dict[str, _Units] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = getattr(getattr(func, "overloadpacket", None), "__name__", "").rstrip("_")
        if (kind in SQUASHERS or (kind in RECTIFIERS and _ends_at_zero(kind, args, kwargs or {}))) and self._counts(
            out
        ):
            self._add(kind, out)
        return out

    def _counts(self, out: Any) -> bool:
        at_work = self._calls.current
        inside = at_work is not None and not isinstance(at_work.module, nn.RNNBase | nn.RNNCellBase)
        return inside and isinstance(out, Tensor) and out.is_floating_point() and out.ndim >= 2 and out.numel() > 0

    def _add(self, kind: str, out: Tensor) -> None:
        dim = unit_dimension(self._calls.last, out)
        stuck, broken = _stuck(kind, out), out.isnan().any()
        stuck_U = stuck.movedim(dim, 0).flatten(1).all(1)
        name = kind if self._calls.last is None else f"{self._calls.last.label}.{kind}"
        if name in self.found and len(self.found[name].stuck_U) != len(stuck_U):
            name = f"{name}.{len(stuck_U)}"  # the same layer at another width
        known = self.found.get(name)
        if known is None:
            self.found[name] = _Units(kind in SQUASHERS, stuck_U, stuck.sum(), stuck.numel(), broken)
        else:
            known.stuck_U, known.broken = known.stuck_U & stuck_U, known.broken | broken
            known.count, known.numel = known.count + stuck.sum(), known.numel + stuck.numel()


def _ends_at_zero(kind: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the lower end of the operator is exactly zero."""
    match kind:
        case "relu" | "hardswish":
            return True
        case "hardtanh":
            return bool(_argument(args, kwargs, 1, "min_val", -1.0) == 0.0)
        case "threshold":
            return bool(_argument(args, kwargs, 2, "value", None) == 0.0)
    low = _argument(args, kwargs, 1, "min", None)
    return isinstance(low, int | float) and low == 0


def _argument(args: Any, kwargs: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _stuck(kind: str, out: Tensor) -> Tensor:
    if kind == "tanh":
        return out.abs() > TANH
    if kind == "sigmoid":
        return (out <= SIGMOID[0]) | (out >= SIGMOID[1])
    return out == 0


def unit_dimension(before: Call | None, out: Tensor) -> int:
    """The dimension of the units of `out`, by the kind of the layer before it."""
    layer = None if before is None else before.module
    if isinstance(layer, _ConvNd | _NormBase | nn.GroupNorm):
        channels = next(
            getattr(layer, n) for n in ("out_channels", "num_features", "num_channels") if hasattr(layer, n)
        )
        return 1 if out.shape[1] == channels else -1
    if isinstance(layer, CHANNELS_LAST):
        return -1
    return 1 if out.ndim >= 4 else -1
