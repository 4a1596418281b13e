"""Follows a forward from module to module: which one is at work, what goes into it and what comes out.

The hooks are torch's global ones, so none ever stands on the user's model, and they live only inside the `with`. A
statistic is taken at the moment of the call: an activation in place, later on, cannot overwrite what was read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from instruments.layout import Layout
from instruments.refusal import Refusal

MOST_MODULES = 200


@dataclass
class Call:
    """One call of one module. `name` is that of `model.named_modules()`, None for what is not part of the model.

    A call is a `leaf` when the module called no other one: `nn.MultiheadAttention`, which only reads the parameters of
    its output projection, is one.
    """

    name: str | None
    module: nn.Module
    leaf: bool = True

    @property
    def label(self) -> str:
        """What it is called in a reading."""
        return self.name or "model"

    @property
    def owns_parameters(self) -> bool:
        return any(True for _ in self.module.parameters(recurse=False))


Enter = Callable[[Call], None]
Leave = Callable[[Call, Sequence[Tensor], Sequence[Tensor]], None]
Mode = TypeVar("Mode", bound=TorchDispatchMode)


class Calls(AbstractContextManager["Calls"]):
    """Inside the `with`, `enter(call)` and `leave(call, tensors in, tensors out)` are called for modules of the model.

    The fused path of `nn.TransformerEncoderLayer` in eval mode calls none of its layers; it is switched off.
    """

    def __init__(self, layout: Layout, *, enter: Enter | None = None, leave: Leave | None = None) -> None:
        self._enter, self._leave = enter, leave
        self._trained = {id(p): name for name, p in zip(layout.names, layout.params, strict=True)}
        self._names: dict[int, str] = {}
        self._open: list[Call] = []
        self._stack = ExitStack()
        self.last: Call | None = None
        """The last leaf with parameters of its own that has returned."""

    @property
    def current(self) -> Call | None:
        """The innermost module of the model that is at work; None outside the model, in the loss for example."""
        return next((call for call in reversed(self._open) if call.name is not None), None)

    def __enter__(self) -> "Calls":
        self._stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        self._stack.callback(register_module_forward_pre_hook(self._entering).remove)
        self._stack.callback(register_module_forward_hook(self._leaving, with_kwargs=True).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._open.clear()

    def _entering(self, module: nn.Module, _args: Any) -> None:
        if self._open:
            self._open[-1].leaf = False
        elif id(module) not in self._names:
            self._learn_names(module)
        call = Call(self._names.get(id(module)), module)
        self._open.append(call)
        if self._enter is not None and call.name is not None:
            self._enter(call)

    def _leaving(self, _module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        call = self._open.pop()
        if call.name is None:
            return
        if call.leaf and call.owns_parameters:
            self.last = call
        if self._leave is not None:
            self._leave(call, _tensors((args, kwargs)), _tensors(output))

    def _learn_names(self, root: nn.Module) -> None:
        """The model, or a part of it that the user's loss calls by itself: its trained parameters say which part.

        A module without trained parameters that is called from outside the model is a loss or a metric.
        """
        for local, p in root.named_parameters():
            full = self._trained.get(id(p), "")
            if full == local or full.endswith(f".{local}"):
                prefix = full[: -len(local)]
                self._names |= {id(m): (prefix + name).rstrip(".") for name, m in root.named_modules()}
                return


@contextmanager
def together(layout: Layout, mode: Callable[[Calls], Mode]) -> Iterator[Mode]:
    """Modules, and the operators inside them, which the mode that is made of their calls sees."""
    with Calls(layout) as calls, mode(calls) as operators:
        yield operators


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def shown(names: Sequence[str]) -> list[int]:
    """Which of many modules stand in a reading: all of them, or 200 at even distances."""
    if len(names) <= MOST_MODULES:
        return list(range(len(names)))
    return [i * (len(names) - 1) // (MOST_MODULES - 1) for i in range(MOST_MODULES)]


def refuse_empty(found: Mapping[str, Any], what: str) -> None:
    """Nothing was seen: the model has none, or its forward is not called as a module."""
    if not found:
        raise Refusal(
            f"expected {what} in the forward, saw none; if there is some, it is called in a way that hooks do not see "
            "(module.forward(x), a scripted module, a fused kernel)."
        )
