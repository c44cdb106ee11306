"""Graphs as text that people read, and as JSON that the loader reads (no pickle anywhere)."""

from __future__ import annotations

import operator
import re

import torch
from torch import Tensor, fx

from xllm import weights
from xllm.graph import Binding, Carried, Constant, Input, State, Weight

_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_LAYOUTS = {str(x): x for x in (torch.strided,)}
_FORMATS = {str(x): x for x in (torch.contiguous_format, torch.preserve_format)}
_PYTHON = {f"{m}.{f}": getattr(operator, f) for m, f in [
    ("operator", f) for f in ("getitem", "mul", "add", "sub", "floordiv", "mod", "neg")]}
_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64",
          torch.int32: "i32", torch.bool: "b8", torch.float64: "f64"}


def target_name(target: object) -> str:
    """``aten.mul.Tensor``, ``xllm.rope.default`` or ``operator.getitem``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    found = [name for name, function in _PYTHON.items() if function is target]
    if not found:
        raise ValueError(f"graph target {target!r} cannot be stored")
    return found[0]


def find_target(name: str) -> object:
    """Inverse of :func:`target_name`; raises ValueError on an unknown op."""
    if name in _PYTHON:
        return _PYTHON[name]
    try:
        namespace, packet, overload = name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"graph names an unknown op {name!r}") from error


# --- JSON ---------------------------------------------------------------------------------------

def _encode(value: object) -> object:
    match value:
        case fx.Node():
            return {"node": value.name}
        case list() | tuple():
            return [_encode(v) for v in value]
        case float() if value != value or value in (float("inf"), float("-inf")):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case torch.dtype() | torch.device() | torch.layout() | torch.memory_format():
            return {type(value).__name__: str(value)}
    raise ValueError(f"graph argument {value!r} cannot be stored")


def _decode(value: object, nodes: dict[str, fx.Node]) -> object:
    match value:
        case list():
            return [_decode(v, nodes) for v in value]
        case {"node": name}:
            return nodes[name]
        case {"float": text}:
            return float(text)
        case {"dtype": name}:
            return _DTYPES[name]
        case {"device": name}:
            return torch.device(name)
        case {"layout": name}:
            return _LAYOUTS[name]
        case {"memory_format": name}:
            return _FORMATS[name]
    return value


def bind_to_json(bind: Binding) -> dict:
    """JSON form of a placeholder's binding."""
    match bind:
        case Weight(recipe):
            return {"weight": weights.to_json(recipe)}
        case Input(name):
            return {"input": name}
        case Constant(name):
            return {"constant": name}
        case State(kind):
            return {"state": kind}
        case Carried():
            return {"carried": True}
    raise ValueError(f"unknown binding {bind!r}")


def bind_from_json(data: dict) -> Binding:
    """Inverse of :func:`bind_to_json`."""
    match data:
        case {"weight": recipe}:
            return Weight(weights.from_json(recipe))
        case {"input": name}:
            return Input(name)
        case {"constant": name}:
            return Constant(name)
        case {"state": kind}:
            return State(kind)
        case {"carried": True}:
            return Carried()
    raise ValueError(f"unknown binding {data!r}")


def graph_to_json(gm: fx.GraphModule) -> list[dict]:
    """Nodes in order. Sizes of placeholders are literals or symbol names."""
    rows = []
    for node in gm.graph.nodes:
        row: dict = {"name": node.name, "op": node.op}
        if node.op == "placeholder":
            val = node.meta["val"]
            row |= {"bind": bind_to_json(node.meta["bind"]), "dtype": str(val.dtype),
                    "shape": [d if isinstance(d, int) else str(d) for d in val.shape]}
        elif node.op == "call_function":
            row |= {"target": target_name(node.target), "args": _encode(node.args),
                    "kwargs": {k: _encode(v) for k, v in node.kwargs.items()}}
        else:
            row["args"] = _encode(node.args)
        rows.append(row)
    return rows


def graph_from_json(rows: list[dict]) -> fx.GraphModule:
    """Inverse of :func:`graph_to_json`; placeholders carry ``bind``, ``dtype`` and ``shape``."""
    graph, nodes = fx.Graph(), {}
    for row in rows:
        if row["op"] == "placeholder":
            node = graph.placeholder(row["name"])
            node.meta.update(bind=bind_from_json(row["bind"]), dtype=_DTYPES[row["dtype"]],
                             shape=tuple(row["shape"]))
        elif row["op"] == "call_function":
            kwargs = {k: _decode(v, nodes) for k, v in row["kwargs"].items()}
            node = graph.create_node("call_function", find_target(row["target"]),
                                     tuple(_decode(row["args"], nodes)), kwargs, row["name"])
        else:
            node = graph.output(tuple(_decode(row["args"], nodes))[0])
        nodes[row["name"]] = node
    return fx.GraphModule(torch.nn.Module(), graph)


# --- text ---------------------------------------------------------------------------------------

def type_text(val: object) -> str:
    """``bf16[1, T, 64]``."""
    if isinstance(val, Tensor):
        return f"{_SHORT.get(val.dtype, str(val.dtype))}[{', '.join(map(str, val.shape))}]"
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(map(type_text, val)) + ")"
    return type(val).__name__


def _value_text(value: object) -> str:
    match value:
        case fx.Node():
            return "%" + value.name
        case list() | tuple():
            return "[" + ", ".join(map(_value_text, value)) + "]"
        case int() if value == 2**63 - 1:
            return "end"
    return str(value).removeprefix("torch.")


def module_path(node: fx.Node) -> str:
    """Where in the model a node comes from: ``model.layers.3.self_attn``, or empty."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0].removeprefix("model.") if stack else ""


def node_text(node: fx.Node) -> str:
    """One line for one node."""
    if node.op == "placeholder":
        return f"%{node.name} : {type_text(node.meta['val'])} <- {node.meta['bind']}"
    if node.op == "output":
        return f"return {_value_text(node.args[0])}"
    arguments = [_value_text(a) for a in node.args]
    arguments += [f"{k}={_value_text(v)}" for k, v in node.kwargs.items()]
    name = re.sub(r"\.default$", "", target_name(node.target))
    return f"%{node.name} : {type_text(node.meta['val'])} = {name}({', '.join(arguments)})"


def graph_text(gm: fx.GraphModule, symbols: dict[str, str]) -> list[tuple[str, str]]:
    """(line, module path) of every node; ``symbols`` renames the tracer's symbols (s77 to T)."""
    pattern = re.compile("|".join(rf"\b{re.escape(s)}\b" for s in symbols) or r"(?!)")
    return [(pattern.sub(lambda found: symbols[found.group()], node_text(node)), module_path(node))
            for node in gm.graph.nodes]
