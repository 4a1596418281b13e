"""How large attention logits become, and how sharply attention looks.

Shapes: Q = queries, K = keys, M = attention modules.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from instruments.instrument import Gauge, Output, Values
from instruments.network._calls import Calls, shown, together
from instruments.refusal import Refusal
from instruments.view import Need, View

MASKED = -9e3
SOFTMAX = frozenset({"_softmax", "_safe_softmax"})
PRODUCTS = frozenset({"bmm", "mm", "baddbmm", "addmm"})


@dataclass(frozen=True)
class AttentionLogits(Gauge):
    """Largest attention logit, and mean entropy of the attention weights, for each module that attends.

    For one query with the logits z_k (scaled by 1/sqrt(d), masks added) and the weights a = softmax(z) the entropy is
    -sum a_k log a_k: log K when all K keys count alike, 0 when one takes all. Logits that grow without end and entropy
    that goes to 0 come before divergence at high learning rates; normalised queries and keys cure it.

    Attention is recognised by what it computes: a softmax over the last of three or more dimensions (..., Q, K), whose
    weights (cast, reshaped, masked or dropped out) go into a matrix product that sums over the K keys. This covers
    `nn.MultiheadAttention`, `F.scaled_dot_product_attention` (read by its plain kernel) and attention by hand. A
    softmax that routes to experts or ends a classifier is not followed by such a product and is left out. Linear
    attention that takes the softmax over features is mistaken for one. `flex_attention` and kernels of other
    libraries are not seen.

    Masked are logits of -inf and below -9,000, the usual finite masks; they count neither as keys nor as logits, and
    queries all of whose keys are masked are left out. All heads, examples and calls of a module are taken together,
    named by the innermost module at work. At most 200 modules are listed; the scalars are over all.
    """

    outputs: ClassVar[Mapping[str, Output]] = {
        "largest": Output("1", "largest attention logit of all"),
        "entropy": Output("nat", "mean entropy of the attention weights over all queries"),
        "entropy_share": Output("1", "that entropy over its mean largest value, log of the keys allowed; 1 is uniform"),
        "lowest_entropy": Output("nat", "smallest mean entropy of a module"),
        "largest_logit": Output("1", "largest attention logit of each module", "per-module"),
        "mean_entropy": Output("nat", "mean entropy of the attention weights of each module", "per-module"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"forward"})
    reference: ClassVar[str] = (
        "Wortsman et al. 2023, Small-scale proxies for large-scale Transformer training, sec. 3.1"
    )

    def price(self, view: View) -> float:
        return 0.5

    def read(self, view: View) -> Values:
        seen = view.forward(lambda: together(view.layout, _Softmaxes))
        if not seen.found:
            raise Refusal(
                "no attention was seen in the forward: no softmax over keys whose weights go into a matrix product. "
                "flex_attention and kernels of other libraries cannot be read."
            )
        names = list(seen.found)
        largest_M = torch.stack([torch.stack([s.largest for s in of_one]).max() for of_one in seen.found.values()])
        sums_M3 = torch.stack([torch.stack([s.sums for s in of_one]).sum(0) for of_one in seen.found.values()])
        entropy_M = sums_M3[:, 0] / sums_M3[:, 2]
        entropy, most, queries = sums_M3.sum(0)
        listed = shown(names)
        view.meter.provenance["modules"] = [names[i] for i in listed]
        return {
            "largest": largest_M.max(),
            "entropy": entropy / queries,
            "entropy_share": entropy / most,
            "lowest_entropy": entropy_M.min(),
            "largest_logit": largest_M[listed],
            "mean_entropy": entropy_M[listed],
        }


@dataclass(frozen=True)
class _Softmax:
    """Largest logit, and (3,): sums over the queries of entropy, log of the keys allowed, and 1."""

    name: str
    keys: int
    largest: Tensor
    sums: Tensor

    @classmethod
    def of(cls, name: str, z: Tensor, a: Tensor) -> "_Softmax":
        allowed = ~(z <= MASKED)  # NaN is no mask
        keys = allowed.sum(-1)
        entropy = torch.special.entr(a.float()).sum(-1).double()
        queries = keys > 0
        log_keys = keys.clamp(min=1).double().log()
        parts = [torch.where(queries, entropy, 0).sum(), log_keys.sum(), queries.sum().double()]
        largest = torch.where(allowed, z, -math.inf).max().double()
        return cls(name, z.shape[-1], largest, torch.stack(parts))


class _Softmaxes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every softmax that turns out to be attention, by module: its weights are followed until a product uses them."""

    supports_higher_order_operators = True

    def __init__(self, calls: Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls
        self._weights: Any = WeakTensorKeyDictionary()
        self.found: dict[str, list[_Softmax]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(getattr(func, "overloadpacket", None), "__name__", "")
        if name in SOFTMAX:
            self._note(args[0], args[1], out)
            return out
        for t in args:
            known = self._weights.get(t) if isinstance(t, Tensor) else None
            if known is None:
                continue
            if name not in PRODUCTS:
                for result in out if isinstance(out, tuple | list) else (out,):
                    if isinstance(result, Tensor) and result.numel() == t.numel() and result.is_floating_point():
                        self._weights[result] = known
            elif args[-2].shape[-1] == known.keys:
                of_one = self.found.setdefault(known.name, [])
                if not any(s is known for s in of_one):
                    of_one.append(known)
        return out

    def _note(self, z: Tensor, dim: int, a: Tensor) -> None:
        at_work = self._calls.current
        if at_work is not None and z.ndim >= 3 and dim % z.ndim == z.ndim - 1 and z.numel():
            self._weights[a] = _Softmax.of(at_work.label, z, a)
