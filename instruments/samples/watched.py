"""The forward and backward pass of a training step, watched: per-example gradients without a pass of their own.

Where a model is known (`fused_engine` has found the examples in its graph and checked its rules, and its forward draws
no random number), what the operations that use parameters saved, and the gradients of their results, are kept as the
training's own backward pass comes by. Nothing is computed there, nothing is changed, and nothing sits on the model: the
one hook is torch's global one on module calls, while a pass is waited for; those on the graph go with the graph.

What was seen counts only if it is proved to be of the loss that was given: one forward, one backward pass, no parameter
that the loss reaches otherwise, and, in `fused_engine.moments_of_step`, the gradient of the model's output and `.grad`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from instruments.layout import Layout
from instruments.samples.factors import Factor
from instruments.samples.graph import Node, Use, find_uses
from instruments.samples.kept import KEPT_BYTES
from instruments.samples.rules import factor

Billed = Callable[[], AbstractContextManager[Any]]
Hook = Callable[[tuple[Tensor | None, ...]], None]


def output_key(layout: Layout, graph: int) -> tuple[object, ...]:
    """Under which a plan is remembered that goes by the graph of the model's output alone."""
    return ("output", layout.names, graph)


@dataclass
class Watched:
    """`factors` by the number of the use; `output` is that of the model, `output_grad` the gradient that came to it.

    `plan` is that of `fused_engine`, `called_with` the arguments of the model, `version` that of the output when it was
    given, `loss` what the user made of it. `whole` is False once something was seen that cannot be used.
    """

    layout: Layout
    uses: list[Use]
    plan: Any
    output: Tensor
    called_with: Any
    version: int
    loss: Tensor = field(default_factory=lambda: torch.tensor(float("nan")))
    factors: dict[int, Factor] = field(default_factory=dict)
    output_grad: Tensor | None = None
    whole: bool = True
    bytes: int = 0
    handles: list[Any] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.whole and self.output_grad is not None and len(self.factors) == len(self.uses)

    def drop(self) -> None:
        """Too much, or not what was expected: let go of what is held."""
        self.whole, self.factors, self.output_grad = False, {}, None

    def release(self) -> None:
        """The hooks go: they hold what was seen, which holds the graph, which holds them, out of sight of Python."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def passed_output(self, grads: tuple[Tensor | None, ...]) -> None:
        """Hook: the backward pass begins at the output of the model."""
        number = self.output.output_nr
        self.output_grad = grads[number]
        if any(grad is not None for other, grad in enumerate(grads) if other != number):
            self.drop()  # the loss depends on a sibling of the output, too

    def passed(self, numbers: list[int], grads: tuple[Tensor | None, ...]) -> None:
        """Hook: an operation that uses parameters is about to run backward."""
        delta = grads[0]
        for number in numbers:
            axis = self.plan.axes[number]
            made = factor(self.uses[number], axis, delta) if self.whole and delta is not None and axis else None
            if made is None:
                self.drop()
                return
            self.bytes += made.bytes
            if self.bytes > KEPT_BYTES:
                self.drop()
                return
            self.factors[number] = made


class PassWatch:
    """Waits for the next pass of a module. `plans` is what is remembered of its graphs, `billed` surrounds all that is
    done here, since it happens within the user's forward and backward pass."""

    def __init__(self, module: nn.Module, plans: dict[Any, Any], billed: Billed) -> None:
        self._module, self._plans, self._billed = module, plans, billed
        self._layout: Layout | None = None
        self._handle: Any = None
        self._forwards = 0
        self._seen: Watched | None = None
        self._starts: list[Callable[..., None]] = []

    def arm(self, layout: Layout) -> None:
        """From now on until `take` the forward passes of the module are looked at, if any of its graphs is known."""
        self.disarm()
        if not any(key[0] == "output" for key in self._plans) or _compiled():
            return
        self._layout = layout
        self._handle = nn.modules.module.register_module_forward_hook(self._forwarded, with_kwargs=True)
        self._starts = _compilation_starts()
        self._starts.append(self._unhook)

    def disarm(self) -> None:
        """Forget what was seen, and wait for nothing."""
        self._unhook()
        if self._unhook in self._starts:
            self._starts.remove(self._unhook)
        if self._seen is not None:
            self._seen.release()
        self._forwards, self._seen = 0, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No pass is waited for while the user evaluates, exports or compiles; then again, if it had not begun."""
        layout = self._layout if self._handle is not None and self._forwards == 0 else None
        self.disarm()
        yield
        if layout is not None:
            self.arm(layout)

    def _unhook(self, *_: Any) -> None:
        """Also at the moment when a compilation starts, which would have to look through the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def take(self, loss: Any) -> Watched | None:
        """What was seen of the pass that this loss went through, if that can be used; disarmed."""
        seen = self._seen
        self.disarm()
        if seen is None or not seen.complete or not isinstance(loss, Tensor) or loss.grad_fn is None:
            return None
        untouched = seen.output._version == seen.version
        seen.loss = loss.detach()
        return seen if untouched and _only_through(loss.grad_fn, seen) else None

    def _forwarded(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return  # nothing of this may get into what is compiled or traced
        if module is not self._module or not torch.is_grad_enabled():
            return
        try:
            with self._billed():
                self._forwards += 1
                if self._seen is not None:
                    self._seen.drop()
                    self._seen.release()
                self._seen = self._watch((args, kwargs), output) if self._forwards == 1 else None
        except Exception:  # whatever it is, it is not the user's concern: the reading makes a pass of its own
            self._seen = None

    def _watch(self, called_with: Any, output: Any) -> Watched | None:
        if not isinstance(output, Tensor) or output.grad_fn is None or _hooked():
            return None
        assert self._layout is not None
        uses, graph, _ = find_uses(output.grad_fn, self._layout.params)
        plan = self._plans.get(output_key(self._layout, graph))
        if plan is None:
            return None
        seen = Watched(self._layout, uses, plan, output, called_with, output._version)
        by_node: dict[Node, list[int]] = {}
        for number, use in enumerate(uses):
            by_node.setdefault(use.node, []).append(number)
        hooks: list[tuple[Node, Hook]] = [(output.grad_fn, seen.passed_output)]
        hooks += [(node, partial(seen.passed, numbers)) for node, numbers in by_node.items()]
        seen.handles = [node.register_prehook(self._guarded(seen, hook)) for node, hook in hooks]
        return seen

    def _guarded(self, seen: Watched, hook: Hook) -> Hook:
        """Nothing that goes wrong here may reach the user's backward pass."""

        def safe(grads: tuple[Tensor | None, ...]) -> None:
            if seen.whole:
                try:
                    with self._billed(), torch.no_grad():
                        hook(grads)
                except Exception:
                    seen.drop()

        return safe


def _only_through(root: Node, seen: Watched) -> bool:
    """Whether the loss depends on the parameters by way of the model's output alone, no sibling of it among them."""
    output, known = seen.output.grad_fn, {id(p) for p in seen.layout.params}
    visited: set[Node] = set()
    waiting, met = [(root, 0)], False
    while waiting:
        node, number = waiting.pop()
        if node is output:
            if number != seen.output.output_nr and node is not root:
                return False
            met = True
        elif node is not None and node not in visited:
            visited.add(node)
            if id(getattr(node, "variable", None)) in known:
                return False
            waiting += node.next_functions
    return met


def same_arguments(one: Any, other: Any) -> bool:
    """The same tensors, or equal ones; all else equal."""
    leaves, spec = tree_flatten(one)
    others, other_spec = tree_flatten(other)
    return spec == other_spec and all(map(_same, leaves, others))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        return (one.data_ptr() == other.data_ptr() and one.stride() == other.stride()) or torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _hooked() -> bool:
    """Whether saved tensors are packed at this moment (offloaded, checkpointed): to look at one would unpack it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _compilation_starts() -> list[Callable[..., None]]:
    """What torch calls when it begins to compile; a list of nobody's where it has not been asked to yet."""
    callback = sys.modules.get("torch._dynamo.callback")
    found: list[Callable[..., None]] = getattr(getattr(callback, "callback_handler", None), "start_callbacks", [])
    return found


def _compiled() -> bool:
    """Whether anything was compiled in this process: a global hook would have it compiled again."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return False
    counters = getattr(utils, "counters", {"frames": True})
    return bool(counters.get("frames") or counters.get("stats"))
