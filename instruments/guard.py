"""Look at a model and leave no trace: what is measured inside `untouched` cannot be noticed by the training run.

Saved and put back bit for bit: the random states of torch (every device in use), NumPy and `random`, and of generators
that modules own; every buffer of every module (the same tensor object, untouched); `.grad` of every parameter (the
same object, or None); the train / eval flag of every module.

Not restored, because it cannot be known: what a user's own `forward` or hook writes elsewhere (a Python counter, a
file, a global).
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

Undo = Callable[[], None]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, the model may be run, seeded, switched to eval and differentiated; afterwards it is as it was.

    Buffers are exchanged for clones and the originals put back: not even their version counter moves, so that a graph
    the user kept across the reading stays valid. Raises nothing of its own; what is raised inside passes through after
    everything is put back.
    """
    undo: list[Undo] = []
    try:
        undo.append(_global_random_states())
        undo.append(_module_random_states(model))
        undo.append(_training_flags(model))
        undo.append(_gradients(model))
        undo.append(_buffers(model))
        yield
    finally:
        for put_back in reversed(undo):
            put_back()


def pin(model: nn.Module, seed: int) -> None:
    """Seed every random stream that `untouched` saves, so that two evaluations draw the same dropout masks."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for generator in _owned_generators(model):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, random.Random):
            generator.seed(seed)
        else:
            generator.bit_generator.state = np.random.Generator(type(generator.bit_generator)(seed)).bit_generator.state


def _global_random_states() -> Undo:
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    numpy_state, python_state = np.random.get_state(), random.getstate()

    def put_back() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return put_back


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _owned_generators(model: nn.Module) -> list[torch.Generator | np.random.Generator | random.Random]:
    kinds = (torch.Generator, np.random.Generator, random.Random)
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, kinds)]


def _module_random_states(model: nn.Module) -> Undo:
    undo: list[Undo] = []
    for generator in _owned_generators(model):
        if isinstance(generator, torch.Generator):
            state = generator.get_state()
            undo.append(lambda g=generator, s=state: g.set_state(s))  # type: ignore[misc]
        elif isinstance(generator, random.Random):
            python_state = generator.getstate()
            undo.append(lambda g=generator, s=python_state: g.setstate(s))  # type: ignore[misc]
        else:
            bits = generator.bit_generator
            undo.append(lambda b=bits, s=bits.state: setattr(b, "state", s))  # type: ignore[misc]

    def put_back() -> None:
        for one in undo:
            one()

    return put_back


def _training_flags(model: nn.Module) -> Undo:
    flags = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for module, training in flags:
            module.training = training

    return put_back


def _gradients(model: nn.Module) -> Undo:
    """Take `.grad` away for the time of the reading: a backward inside cannot add to what the user accumulated."""
    held = [(p, p.grad) for p in model.parameters()]
    for p, _ in held:
        p.grad = None

    def put_back() -> None:
        for p, grad in held:
            p.grad = grad

    return put_back


def _buffers(model: nn.Module) -> Undo:
    clones: dict[int, Tensor] = {}
    held = [(module, dict(module._buffers)) for module in model.modules()]
    for module, buffers in held:
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = clones.setdefault(id(buffer), buffer.detach().clone())

    def put_back() -> None:
        for module, buffers in held:
            module._buffers.clear()
            module._buffers.update(buffers)

    return put_back
