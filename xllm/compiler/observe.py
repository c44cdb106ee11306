"""What the model's own code does while it is captured, seen from outside the graph.

Passes are told how often they must fire. Those numbers come from here and from the module tree,
not from the graph that they rewrite: a pattern that stops matching then shows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass
class Linear:
    """One call of ``torch.nn.functional.linear`` with a parameter of the model."""

    module: str
    x: Tensor
    weight: Tensor
    has_bias: bool


@dataclass
class Rotation:
    """One call of a model's ``apply_rotary_...`` function: on q and k in ``module``."""

    module: str
    apply: Callable
    head_dim: int
    table_dim: int


@dataclass
class Observer:
    """Records calls while the model runs; ``path`` is the stack of modules that are running.

    ``guards`` are the modules that were running when the number of tokens was first compared with
    something: where capture with a symbolic number of tokens fails, they say why.
    """

    path: list[tuple[str, nn.Module]] = field(default_factory=list)
    linears: list[Linear] = field(default_factory=list)
    rotations: list[Rotation] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    guards: list[str] = field(default_factory=list)

    def where(self) -> str:
        """The innermost module that is running, with its class."""
        if not self.path:
            return "model"
        name, module = self.path[-1]
        return f"{name or 'model'} ({type(module).__name__})"

    def _guards_of(self, tensors: tuple) -> int:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                for size in tensor.shape:
                    if isinstance(size, torch.SymInt):
                        return len(size.node.shape_env.guards)
        return -1

    def _enter(self, name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.path.append((name, module))
            self.calls[name] = self.calls.get(name, 0) + 1
            module.xllm_guards = self._guards_of((*args, *kwargs.values()))
        return hook

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, result: object) -> None:
        now = self._guards_of((*args, *kwargs.values()))
        if 0 <= module.xllm_guards < now:
            self.guards.append(self.where())
        self.path.pop()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Note a linear layer whose weight is a parameter as it is."""
        name, module = self.path[-1] if self.path else ("", nn.Module())
        if any(weight is p for p in module.parameters(recurse=False)):
            self.linears.append(Linear(name, x, weight, bias is not None))


    def rotary(self, apply: Callable) -> Callable:
        """``apply`` of a model's code, noted when called."""
        def noting(q: Tensor, k: Tensor, cos: Tensor, *rest: object, **options: object) -> object:
            self.rotations.append(Rotation(self.path[-1][0], apply, q.shape[-1], cos.shape[-1]))
            return apply(q, k, cos, *rest, **options)
        return noting


class _Functions(TorchFunctionMode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        if func is torch.nn.functional.linear:
            self.observer.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _rotary_functions(model: nn.Module) -> list[tuple[ModuleType, str]]:
    """Where the model's code keeps its functions that rotate q and k."""
    sources = {sys.modules[type(m).__module__] for m in model.modules()}
    return [(source, name) for source in sources for name, value in vars(source).items()
            if name.startswith("apply_rotary") and callable(value)]


@contextmanager
def observed(model: nn.Module) -> Iterator[Observer]:
    """Observe the model while it runs inside the block."""
    observer = Observer()
    undo: list[Callable[[], None]] = []
    for name, module in model.named_modules():
        undo.append(module.register_forward_pre_hook(
            observer._enter(name), with_kwargs=True).remove)
        undo.append(module.register_forward_hook(observer._leave, with_kwargs=True).remove)
    for source, name in _rotary_functions(model):
        original = vars(source)[name]
        undo.append(partial(setattr, source, name, original))
        setattr(source, name, observer.rotary(original))
    try:
        with _Functions(observer):
            yield observer
    finally:
        for step in undo:
            step()
