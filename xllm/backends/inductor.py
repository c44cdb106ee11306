"""The Inductor backend: AOTInductor packages, weights passed as arguments.

A package is a pure function of its placeholders: one package serves every layer that is alike,
with that layer's weights. Custom kernels are called through the dispatcher, in place.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, fx

from xllm.backends.base import BackendError, BuildOptions, Compiled
from xllm.graph import copy_graph, placeholders
from xllm.torch_private import aoti_compile, aoti_load

OPTIONS = {
    "cpp.dynamic_threads": True,  # the package runs on any number of cores
    "aot_inductor.use_minimal_arrayref_interface": False,
}


#: Vector features that code compiled for a machine may use (compilers take what they find).
_FEATURE = re.compile(r"(avx|amx|fma|f16c|bmi|sse4|asimd|sve|i8mm|bf16)\w*")


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """This machine's vector features as the kernel lists them; empty where it lists none."""
    if not cpuinfo.is_file():
        return []
    lines = cpuinfo.read_text().splitlines()
    flags = next((x for x in lines if x.startswith(("flags", "Features"))), ":")
    return sorted(f for f in flags.split(":", 1)[1].split() if _FEATURE.fullmatch(f))


def example(node: fx.Node, sizes: dict[str, int], names: dict[str, str]) -> Tensor:
    """An uninitialised tensor of a placeholder's dtype and shape; memory is not touched."""
    val = node.meta["val"]
    return torch.empty([_size(d, sizes, names) for d in val.shape], dtype=val.dtype)


def _size(dim: int | torch.SymInt, sizes: dict[str, int], names: dict[str, str]) -> int:
    if isinstance(dim, int):
        return dim
    expression = dim.node.expr
    values = {s: sizes[names[str(s)]] for s in expression.free_symbols}
    return int(expression.subs(values))


class InductorBackend:
    """See the module."""

    name = "inductor"

    def host_factors(self) -> dict[str, object]:
        """The torch build and the vector instructions."""
        return {"torch": torch.__version__, "cpu_features": cpu_features()}

    def missing(self, factor: str, built: object) -> str:
        """The torch version if it is another one, or the lacking vector instructions."""
        here = self.host_factors()[factor]
        if factor == "cpu_features":
            return ", ".join(sorted(set(built) - set(here)))
        return "" if built == here else str(built)

    def build(self, piece: fx.GraphModule, options: BuildOptions, out: Path) -> None:
        """Compile one piece; raises :class:`BackendError`."""
        gm = copy_graph(piece)
        nodes = placeholders(gm)
        # a symbol of one value is a constant
        static = {n: 1 for n, most in options.sizes.items() if most == 1} | options.static
        sample = {n: min(most, 7) for n, most in options.sizes.items()} | static
        args = tuple(example(node, sample, options.symbols) for node in nodes)
        dims = {name: torch.export.Dim("dim_" + name, min=1, max=most)
                for name, most in options.sizes.items() if name not in static}
        shapes = tuple(_dynamic(node, dims, options.symbols) for node in nodes)
        _on_cpu(gm)
        _contiguous_outputs(gm)
        try:
            with torch.no_grad():
                exported = torch.export.export(gm, args, dynamic_shapes=shapes, strict=False)
                aoti_compile(exported, out, OPTIONS)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise BackendError(f"inductor could not compile {out.name}: {reason}") from error

    def load(self, blob: Path) -> Compiled:
        """Load a package; needs no compiler."""
        try:
            return aoti_load(blob)
        except RuntimeError as error:
            raise BackendError(f"{blob} cannot be loaded: {str(error).splitlines()[0]}") from error


def _on_cpu(gm: fx.GraphModule) -> None:
    """Move literal meta devices in arguments (``arange`` and the like) to the CPU."""
    for node in gm.graph.nodes:
        node.kwargs = {k: torch.device("cpu") if k == "device" else v
                       for k, v in node.kwargs.items()}
    gm.recompile()


def _contiguous_outputs(gm: fx.GraphModule) -> None:
    """Lay out what a piece gives to others as they expect it: a package checks no strides."""
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        output.args = (tuple(gm.graph.call_function(torch.ops.aten.contiguous.default, (node,))
                             for node in output.args[0]),)
    gm.recompile()


def _dynamic(node: fx.Node, dims: dict[str, torch.export.Dim],
             symbols: dict[str, str]) -> dict[int, object]:
    """``dynamic_shapes`` of one placeholder: axis → Dim, a multiple of it, or it plus a number."""
    found: dict[int, object] = {}
    for axis, size in enumerate(node.meta["val"].shape):
        if isinstance(size, int) or not size.node.expr.free_symbols:  # some constants are symbolic
            continue
        (symbol,) = size.node.expr.free_symbols
        name = symbols[str(symbol)]
        if name in dims:
            factor, extra = int(size.node.expr.coeff(symbol)), int(size.node.expr.subs(symbol, 0))
            found[axis] = dims[name] if factor == 1 else factor * dims[name]
            found[axis] = found[axis] + extra if extra else found[axis]
    return found
