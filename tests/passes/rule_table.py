"""Every rule of every pass, with what its tests need. A new rule needs an entry here."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import xllm.passes
from tests.passes.pass_graphs import Maker, aten
from xllm.passes.rewrite import Rewrite

Arguments = dict[str, object]
Draw = Callable[[Maker, random.Random], Arguments]
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Entry:
    """What the generic tests need to know of a rule.

    ``draw`` makes arguments that ``before`` and ``after`` accept, with fakes or values; ``refused``
    makes arguments that fit the pattern but not ``when``; ``link`` makes the arguments of a second
    site from the first one's results; ``symmetric`` lists parameters that may be swapped.
    """

    rule: Rewrite
    draw: Draw
    refused: tuple[Draw, ...]
    link: Callable[[object, Arguments], Arguments]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    symmetric: tuple[tuple[str, str], ...] = ()


def pass_modules() -> list[object]:
    """All modules of :mod:`xllm.passes`."""
    names = sorted(info.name for info in pkgutil.iter_modules(xllm.passes.__path__))
    return [importlib.import_module(f"xllm.passes.{name}") for name in names]


def rules() -> dict[str, Rewrite]:
    """``module.before`` → rule, for the RULES of every pass module."""
    return {f"{module.__name__.rsplit('.', 1)[-1]}.{rule.before.__name__}": rule
            for module in pass_modules() for rule in vars(module).get("RULES", ())}


# --- norms ---------------------------------------------------------------------------------------

def _norm(make: Maker, rng: random.Random) -> Arguments:
    width = rng.choice([8, 2, 24])
    return {"x": make.randn(1, make.tokens, width), "weight": make.randn(width),
            "eps": rng.choice([1e-6, 1e-2])}


def _norm_cast(make: Maker, rng: random.Random) -> Arguments:
    return _norm(make, rng) | {"dtype": make.dtype}


def _flat_weight(draw: Draw) -> Draw:
    def refused(make: Maker, rng: random.Random) -> Arguments:
        arguments = draw(make, rng)
        return arguments | {"weight": make.randn(1, arguments["x"].shape[-1])}

    return refused


def _one_weight(draw: Draw) -> Draw:
    return lambda make, rng: draw(make, rng) | {"weight": make.randn(1)}


def _half_precision(make: Maker, rng: random.Random) -> Arguments:
    make.dtype = torch.bfloat16
    return _norm(make, rng)


def _other_dtype(make: Maker, rng: random.Random) -> Arguments:
    return _norm(make, rng) | {"dtype": torch.float16}


def _next_x(result: object, arguments: Arguments) -> Arguments:
    return arguments | {"x": result}


def _add_norm(make: Maker, rng: random.Random) -> Arguments:
    arguments = _norm(make, rng)
    shape = arguments["x"].shape
    return {"x": arguments["x"], "residual": make.randn(*shape)} | arguments


def _add_row(make: Maker, rng: random.Random) -> Arguments:
    arguments = _add_norm(make, rng)
    return arguments | {"x": make.randn(arguments["x"].shape[-1])}


def _add_number(make: Maker, rng: random.Random) -> Arguments:
    return _add_norm(make, rng) | {"x": 0.5}


def _next_residual(result: object, arguments: Arguments) -> Arguments:
    return arguments | {"x": result[0], "residual": result[1]}


# --- rotary embedding and activation -------------------------------------------------------------

def _rope(make: Maker, rng: random.Random) -> Arguments:
    heads, dim = rng.choice([2, 1, 4]), rng.choice([8, 4])
    cos, sin = (make.randn(1, 1, make.tokens, dim) for _ in range(2))
    return {"x": make.randn(1, heads, make.tokens, dim), "cos": cos, "sin": sin, "half": dim // 2}


def _uneven_halves(make: Maker, rng: random.Random) -> Arguments:
    arguments = _rope(make, rng)
    return arguments | {"half": arguments["half"] - 1}


def _one_angle(make: Maker, rng: random.Random) -> Arguments:
    return _rope(make, rng) | {"cos": make.randn(1, 1, make.tokens, 1)}


def _silu(make: Maker, rng: random.Random) -> Arguments:
    shape = 1, make.tokens, rng.choice([8, 2, 24])
    return {"gate": make.randn(*shape), "up": make.randn(*shape)}


def _one_row(make: Maker, rng: random.Random) -> Arguments:
    arguments = _silu(make, rng)
    return arguments | {"up": make.randn(arguments["up"].shape[-1])}


def _next_gate(result: object, arguments: Arguments) -> Arguments:
    return arguments | {"gate": result}


# --- q/k norm, rotary embedding, KV write --------------------------------------------------------

def _write(make: Maker, rng: random.Random) -> Arguments:
    heads, groups, dim = rng.choice([(4, 2, 8), (2, 2, 4), (3, 1, 8)])
    return _write_of(make, heads, groups, groups, dim)


def _write_of(make: Maker, heads: int, groups: int, cached: int, dim: int) -> Arguments:
    ends = [n * dim for n in (heads, heads + groups, heads + 2 * groups)]
    cos, sin = (make.randn(1, make.tokens, dim) for _ in range(2))
    return {
        "qkv": make.randn(1, make.tokens, (heads + 2 * cached) * dim), "cos": cos, "sin": sin,
        "kv_cache": make.randn(make.pages, 2, cached, 4, dim), "slots": make.slots(4),
        "q_shape": [1, -1, heads, dim], "k_shape": [1, -1, groups, dim],
        "end_q": ends[0], "end_k": ends[1], "end_v": ends[2],
    }


def _norm_write(make: Maker, rng: random.Random) -> Arguments:
    arguments = _write(make, rng)
    dim = arguments["kv_cache"].shape[-1]
    return arguments | {"q_norm": make.randn(dim), "k_norm": make.randn(dim), "eps": 1e-2}


def _fewer_groups(make: Maker, rng: random.Random) -> Arguments:
    """One KV head that the write spreads over a cache of two, out of a wider projection."""
    return _write_of(make, heads=4, groups=1, cached=2, dim=8)


def _norm_fewer_groups(make: Maker, rng: random.Random) -> Arguments:
    return _fewer_groups(make, rng) | {"q_norm": make.randn(8), "k_norm": make.randn(8),
                                       "eps": 1e-2}


def _next_qkv(result: object, arguments: Arguments) -> Arguments:
    flat = aten.view.default(result, [1, -1, arguments["end_q"]])
    rest = aten.slice.Tensor(arguments["qkv"], 2, arguments["end_q"], arguments["end_v"])
    return arguments | {"qkv": aten.cat.default([flat, rest], -1)}


# --- the table -----------------------------------------------------------------------------------

def _entries() -> dict[str, Entry]:
    found = rules()
    norm = Entry(found["recognise_rms_norm.weight_first"], _norm,
                 (_flat_weight(_norm), _one_weight(_norm), _half_precision), _next_x,
                 (torch.float32,))
    cast = replace(norm, draw=_norm_cast, dtypes=DTYPES, refused=(
        _flat_weight(_norm_cast), _one_weight(_norm_cast), _other_dtype))
    silu = Entry(found["recognise_silu_mul.gate_first"], _silu, (_one_row,), _next_gate)
    write = Entry(found["fuse_qk_norm_rope_kv_write.without_norm"], _write, (_fewer_groups,),
                  _next_qkv)
    table = {
        "recognise_rms_norm.weight_first": norm,
        "recognise_rms_norm.weight_last": norm,
        "recognise_rms_norm.cast_weight_first": cast,
        "recognise_rms_norm.cast_weight_last": cast,
        "recognise_rope.rotate_half": Entry(
            found["recognise_rope.rotate_half"], _rope, (_uneven_halves, _one_angle), _next_x),
        "recognise_silu_mul.gate_first": silu,
        "recognise_silu_mul.up_first": silu,
        "fuse_add_rms_norm.separate": Entry(
            found["fuse_add_rms_norm.separate"], _add_norm, (_add_row, _add_number),
            _next_residual, symmetric=(("residual", "x"),)),
        "fuse_qk_norm_rope_kv_write.without_norm": write,
        "fuse_qk_norm_rope_kv_write.with_norm": replace(
            write, draw=_norm_write, refused=(_norm_fewer_groups,)),
    }
    return {name: replace(entry, rule=found[name]) for name, entry in table.items()
            if name in found}


TABLE = _entries()
