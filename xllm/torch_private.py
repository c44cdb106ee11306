"""The one file that touches torch API without a stability promise (torch 2.11 to 2.13)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

__all__ = ["FakeTensorMode", "aoti_compile", "aoti_load", "same_type", "trace_symbolic"]


def same_type(a: object, b: object) -> bool:
    """Whether two fake values have the same dtype and provably the same shape."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    return all(statically_known_true(sym_eq(x, y)) for x, y in zip(a.shape, b.shape, strict=True))


def trace_symbolic(run: Callable, args: list[Tensor], mode: FakeTensorMode) -> fx.GraphModule:
    """Trace ``run(*args)`` to aten ops on fake tensors that keep their symbolic sizes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with mode, fx.traceback.preserve_node_meta():
        return make_fx(run, pre_dispatch=True)(*args)


def aoti_compile(exported: torch.export.ExportedProgram, out: Path, options: dict) -> None:
    """Compile with AOTInductor into a package at ``out``."""
    from torch._inductor import aoti_compile_and_package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own pytree
        aoti_compile_and_package(exported, package_path=str(out), inductor_configs=options)


def aoti_load(package: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """The package as a callable on a list of tensors; needs neither a compiler nor Inductor."""
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", True, 1, -1)
    return loader.run
