"""Everything that training could notice, as plain values that can be compared bit for bit."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def bits(value: Any) -> Any:
    """The bytes of a tensor (NaN equal to itself), and the same through containers."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
        return (str(value.dtype), tuple(value.shape), dense.contiguous().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value


def state_of(model: nn.Module, optimizers: Sequence[Any]) -> dict[str, Any]:
    """Values: what a run with and without the cockpit must have in common."""
    return {
        "parameters": {name: bits(p) for name, p in model.named_parameters()},
        "buffers": {name: bits(b) for name, b in model.named_buffers()},
        "grad": {name: bits(p.grad) for name, p in model.named_parameters()},
        "optimizers": [bits(o.state_dict()) for o in optimizers],
        "optimizer state": [[bits(o.state[p]) for p in o.state] for o in optimizers],
        "flags": {name: m.training for name, m in model.named_modules()},
        "random": global_random(),
        "owned random": [bits(_position(v)) for m in model.modules() for v in vars(m).values() if _draws(v)],
        "attributes": {name: sorted(vars(p)) for name, p in model.named_parameters()},
        "modules": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "hooks": {
            name: {key: len(value) for key, value in vars(m).items() if "hooks" in key and value is not None}
            for name, m in model.named_modules()
        },
        "tensor hooks": {name: [p._backward_hooks, p.grad_fn] for name, p in model.named_parameters()},
    }


def objects_of(model: nn.Module, optimizers: Sequence[Any]) -> dict[str, Any]:
    """Identities and version counters: what one call of the cockpit must leave as it is."""
    return {
        "parameters": {name: (id(p), p._version) for name, p in model.named_parameters()},
        "grad": {name: p.grad is not None and (id(p.grad), p.grad._version) for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b._version) for name, b in model.named_buffers()},
        "optimizers": [[id(p) for p in o.state] for o in optimizers],
        "hooks": {name: [id(v) for k, v in vars(m).items() if "hooks" in k] for name, m in model.named_modules()},
        "process": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "backends": [torch._C._get_flash_sdp_enabled(), torch._C._get_math_sdp_enabled()],
    }


def global_random() -> list[Any]:
    return [bits(torch.get_rng_state()), torch.initial_seed(), bits(np.random.get_state()), random.getstate()]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths at which two traces differ."""
    if one == other:
        return []
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return [path for key in one for path in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [path for i, (a, b) in pairs for path in differences(a, b, f"{where}/{i}")]
    return [where]


def _draws(value: Any) -> bool:
    return isinstance(value, GENERATORS)


def _position(generator: Any) -> Any:
    """Where a generator stands in its stream."""
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state
