"""Look at a model and leave no trace: what is measured inside `untouched` cannot be noticed by the training run.

Saved and put back bit for bit: the random states of torch (every device in use), NumPy and `random`, and of generators
that modules own; every buffer of every module (the same tensor object, untouched); `.grad` of every parameter (the
same object, or None); every attribute that a module has, its train / eval flag among them.

Not restored, because it cannot be known: what a user's own `forward` or hook writes elsewhere (into a list that the
module holds, a file, a global).
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from instruments.refusal import Refusal

Undo = Callable[[], None]


@contextmanager
def untouched(model: nn.Module) -> Iterator["Saved"]:
    """Inside, the model may be run, seeded, switched to eval and differentiated; afterwards it is as it was.

    Yields the random streams, to be seeded, and the buffers, which can be made fresh, before forwards that must see
    the same.

    Buffers are exchanged for clones and the originals put back: not even their version counter moves, so that a graph
    the user kept across the reading stays valid. What is raised inside passes through after everything is put back.
    Raises Refusal for modules of TorchScript, whose buffers cannot be exchanged.
    """
    modules = list(model.modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise Refusal(
            "expected modules of Python, got one compiled by torch.jit, whose buffers cannot be exchanged and put "
            "back; train the module itself, or compile it by torch.compile. What needs no forward is read all the same."
        )
    with ExitStack() as undo:  # every part is put back, even if another one cannot be
        random_states = RandomStates.of_modules(modules)
        undo.callback(random_states.put_back)
        undo.callback(_attributes(modules))
        undo.callback(_gradients(modules))
        undo.callback(_renormalised(modules))
        buffers = Buffers(modules)
        undo.callback(buffers.put_back)
        buffers.fresh()
        yield Saved(random_states, buffers)


def scripted(model: nn.Module) -> bool:
    """Whether a part of the model is compiled by torch.jit."""
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


@dataclass(frozen=True)
class Stream:
    """One source of random numbers: how its state is read, put back and seeded."""

    get: Callable[[], Any]
    set: Callable[[Any], object]
    seed: Callable[[int], object]


@dataclass(frozen=True)
class RandomStates:
    """Where every random stream that a forward of a model may draw from stands."""

    saved: Sequence[tuple[Stream, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> "RandomStates":
        return cls.of_modules(list(model.modules()))

    @classmethod
    def of_modules(cls, modules: Sequence[nn.Module]) -> "RandomStates":
        return cls([(stream, stream.get()) for stream in _streams(modules)])

    def now(self) -> "RandomStates":
        """Where the same streams stand at present."""
        return RandomStates([(stream, stream.get()) for stream, _ in self.saved])

    def pin(self, seed: int) -> None:
        """Seed every stream, so that two evaluations draw the same dropout masks."""
        for stream, _ in self.saved:
            stream.seed(seed)

    def put_back(self) -> None:
        for stream, state in self.saved:
            stream.set(state)

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        return not all(_same(stream.get(), state) for stream, state in self.saved)


def _streams(modules: Sequence[nn.Module]) -> list[Stream]:
    # torch.manual_seed would also leave a seed for devices that nobody has used yet.
    streams = [
        Stream(torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed),
        Stream(np.random.get_state, np.random.set_state, lambda seed: np.random.seed(seed % 2**32)),
        Stream(random.getstate, random.setstate, random.seed),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        streams.append(Stream(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all, torch.cuda.manual_seed_all))
    if torch.backends.mps.is_available():
        streams.append(Stream(torch.mps.get_rng_state, torch.mps.set_rng_state, torch.mps.manual_seed))
    owned = [value for module in modules for value in vars(module).values() if _generates(value.__class__)]
    return streams + [_stream_of(value) for value in owned]


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@cache
def _generates(kind: Any) -> bool:
    """By type, as `isinstance` on a torch.Generator takes ten times as long and models have thousands of attributes."""
    return issubclass(kind, _GENERATORS)


def _stream_of(generator: Any) -> Stream:
    if isinstance(generator, torch.Generator):
        return Stream(generator.get_state, generator.set_state, generator.manual_seed)
    if isinstance(generator, random.Random):
        return Stream(generator.getstate, generator.setstate, generator.seed)
    if isinstance(generator, np.random.RandomState):
        return Stream(generator.get_state, generator.set_state, lambda seed: generator.seed(seed % 2**32))
    bits = generator.bit_generator
    put = partial(setattr, bits, "state")
    return Stream(lambda: bits.state, put, lambda seed: put(type(bits)(seed).state))


def _same(one: Any, other: Any) -> bool:
    """Equality of random states, which are nested tensors, arrays and numbers."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Mapping):
        return all(_same(one[key], other[key]) for key in one)
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # a tuple with tensors or arrays in it, which have no one answer
        return all(map(_same, one, other))


def _attributes(modules: Sequence[nn.Module]) -> Undo:
    """Every plain attribute of every module: a forward that stores an activation or counts calls leaves no trace."""
    held = [(vars(module), dict(vars(module))) for module in modules]

    def put_back() -> None:
        for now, before in held:
            if now.keys() == before.keys() and all(map(is_, now.values(), before.values())):
                continue
            for name in [name for name in now if name not in before]:
                del now[name]
            for name, value in before.items():
                if now.get(name, now) is not value:
                    now[name] = value

    return put_back


def _gradients(modules: Sequence[nn.Module]) -> Undo:
    """Take `.grad` away for the time of the reading: a backward inside cannot add to what the user accumulated."""
    params = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    held = [(p, p.grad) for p in params.values()]
    for p, grad in held:
        if grad is not None:
            p.grad = None

    def put_back() -> None:
        for p, grad in held:
            if p.grad is not grad:
                p.grad = grad

    return put_back


def _renormalised(modules: Sequence[nn.Module]) -> Undo:
    """Weights that a forward writes to, those of embeddings with `max_norm`, are exchanged for copies."""

    def limited(module: nn.Module) -> bool:  # getattr would go through nn.Module's own search for every other module
        return vars(module).get("max_norm", getattr(type(module), "max_norm", None)) is not None

    owners = [module for module in modules if limited(module)]
    weights = {id(w): w for module in owners if isinstance(w := getattr(module, "weight", None), nn.Parameter)}
    held = [(w, w.data, w._version) for w in weights.values()]
    for w, own, _ in held:
        w.data = own.clone()

    def put_back() -> None:
        for w, own, version in held:
            w.data = own
            torch._C._autograd._unsafe_set_version_counter((w,), (version,))

    return put_back


class Buffers:
    """The buffers of a model, exchanged for clones while it is measured."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._held = [(module, dict(module._buffers)) for module in modules]

    def fresh(self) -> None:
        """New clones of the originals: what the last forward wrote is forgotten."""
        clones: dict[int, Tensor] = {}
        for module, buffers in self._held:
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = clones.setdefault(id(buffer), buffer.detach().clone())

    def put_back(self) -> None:
        for module, buffers in self._held:
            if buffers or module._buffers:
                module._buffers.clear()
                module._buffers.update(buffers)


class Saved(NamedTuple):
    """What a forward inside `untouched` may use up, so that the next one finds it as the first did."""

    random: RandomStates
    buffers: Buffers
