"""Small graphs for pass tests, typed as captured ones: fake tensors on meta, a symbolic T."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from xllm.backends.eager import interpret
from xllm.graph import Call, Constant, Input, Program, State, Weight, placeholders, retype
from xllm.passes.core import ModelFacts, PassContext
from xllm.serialize import graph_text
from xllm.targets import find
from xllm.weights import Leaf, evaluate

aten = torch.ops.aten
xllm = torch.ops.xllm
Size = int | torch.SymInt
MODE = FakeTensorMode(shape_env=ShapeEnv())


def _symbols(*examples: int) -> list[torch.SymInt]:
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC] * len(examples))
    return list(MODE.from_tensor(torch.empty(examples, device="meta"),
                                 symbolic_context=context).shape)


#: Symbols for tokens, sequences, block-table width, wanted rows and pages.
T, S, M, R, P = _symbols(7, 3, 5, 4, 11)


def fake(shape: tuple[Size, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A fake tensor on the meta device."""
    with MODE:
        return torch.empty(shape, dtype=dtype, device="meta")


class FakeMaker:
    """Makes the arguments of a pattern as fake tensors with symbolic T and P."""

    tokens: Size = T
    pages: Size = P

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def randn(self, *shape: Size, dtype: torch.dtype | None = None) -> Tensor:
        """Values around zero."""
        return fake(shape, dtype or self.dtype)

    def slots(self, page_size: int) -> Tensor:
        """Distinct slots of a cache, one per token."""
        return fake((self.tokens,), torch.int64)


class RealMaker:
    """Makes the same arguments with values that depend on ``rng`` only."""

    def __init__(self, dtype: torch.dtype, rng: random.Random) -> None:
        self.dtype, self.tokens = dtype, rng.choice([1, 2, 5, 9])
        self.generator = torch.Generator().manual_seed(rng.getrandbits(40))
        self.pages = 6

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def slots(self, page_size: int) -> Tensor:
        """Distinct slots behind page 0."""
        count = (self.pages - 1) * page_size
        return torch.randperm(count, generator=self.generator)[: self.tokens] + page_size


Maker = FakeMaker | RealMaker


def type_nodes(gm: fx.GraphModule) -> fx.GraphModule:
    """Type every call node that has no type yet."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            retype(node, MODE)
    return gm


def _size(graph: fx.Graph, size: torch.SymInt) -> fx.Node:
    """A node that reads ``size`` from a placeholder."""
    node, dim = next((n, i) for n in graph.find_nodes(op="placeholder")
                     for i, s in enumerate(n.meta["val"].shape) if str(s) == str(size))
    return graph.call_function(aten.sym_size.int, (node, dim))


def build(function: Callable[..., object], arguments: dict[str, object],
          weights: tuple[str, ...] = ()) -> fx.GraphModule:
    """The graph of ``function``; tensors become placeholders, symbolic sizes are read from the
    first that has them, everything else stays literal.

    Placeholders named in ``weights`` are bound as parameters, the others as constants.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    bound: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            node = graph.placeholder(name)
            node.meta = {"val": value, "bind": Weight(Leaf(name + ".weight")) if name in weights
                         else Constant(name)}
            value = fx.Proxy(node, tracer)
        elif isinstance(value, torch.SymInt):
            value = fx.Proxy(_size(graph, value), tracer)
        bound[name] = value
    result = function(**bound)
    values = result if isinstance(result, (tuple, list)) else (result,)
    graph.output(tuple(v.node for v in values))
    return type_nodes(fx.GraphModule(torch.nn.Module(), graph))


def lines(gm: fx.GraphModule) -> str:
    """The graph as text, symbols named."""
    names = {str(size): name for name, size in zip("TSMRP", (T, S, M, R, P), strict=True)}
    return "\n".join(line for line, _ in graph_text(gm, names))


def clean(gm: fx.GraphModule) -> fx.GraphModule:
    """What the runner does behind a pass, without dropping placeholders: lint and dead code."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    for node in gm.graph.nodes:
        assert node.op != "call_function" or "val" in node.meta, f"{node} has no type"
    return gm


def clones(arguments: dict[str, object]) -> dict[str, object]:
    """Arguments that an op may write to."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def execute_bound(gm: fx.GraphModule, values: dict[str, Tensor]) -> list[Tensor]:
    """Outputs with every placeholder's binding resolved; ``values`` by name of weight or input."""
    inputs = []
    for node in placeholders(gm):
        match node.meta["bind"]:
            case Weight(recipe):
                inputs.append(evaluate(recipe, lambda leaf: values[leaf.removesuffix(".weight")]))
            case Input(name) | Constant(name) | State(name):
                inputs.append(values[name])
    return interpret(gm)(inputs)


def execute(gm: fx.GraphModule, arguments: dict[str, object]) -> list[Tensor]:
    """Outputs, then all arguments as the run left them."""
    values = clones(arguments)
    inputs = [values[n.name] for n in placeholders(gm)]
    return interpret(gm)(inputs) + inputs


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    """Same number of values, each the same to the bit."""
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def targets(gm: fx.GraphModule) -> list[object]:
    """Targets of the call nodes in order."""
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


FACTS = ModelFacts(
    "Test", num_layers=1, norms=("norm",), num_residual_norms=1, num_gated_mlps=1, num_moe_layers=1,
    num_even_expert_weights=2, num_latent_attentions=0, num_rotations=2, num_fused_qkv=1,
    num_even_linears=3, num_linear_groups=2, num_grouped_linears=5, linears=(),
    tied_embeddings=False, hidden_size=32, vocab_size=96, context_length=512)


def context(dtype: torch.dtype = torch.float32, facts: ModelFacts = FACTS,
            page_size: int = 4) -> PassContext:
    """A pass context for the CPU with the batch inputs as fakes."""
    int64, int32 = torch.int64, torch.int32
    inputs = {
        "input_ids": fake((1, T), int64), "positions": fake((1, T), int64),
        "slot_mapping": fake((T,), int64), "block_table": fake((S, M), int32),
        "query_start_loc": fake((S + 1,), int32), "seq_lens": fake((S,), int32),
        "logits_rows": fake((R,), int64), "pages": fake((P,), int64),
    }
    return PassContext(facts, find("cpu"), dtype, page_size, inputs)


def program_of(gm: fx.GraphModule, ctx: PassContext) -> Program:
    """A program of one piece."""
    return Program({"model": gm}, [Call("model")], ctx.inputs, {}, MODE)
