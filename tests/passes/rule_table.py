"""Every rule of every pass, with what its tests need. A new rule needs an entry here."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

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


def _transposed_norm(make: Maker, rng: random.Random) -> Arguments:
    heads, width = rng.choice([2, 3]), rng.choice([8, 6])
    return {"x": make.randn(1, make.tokens, heads, width), "weight": make.randn(width),
            "eps": 1e-6, "first": 1, "second": 2}


def _last_moves(make: Maker, rng: random.Random) -> Arguments:
    arguments = _transposed_norm(make, rng)
    return arguments | {"weight": make.randn(arguments["x"].shape[2]), "first": 2, "second": 3}


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


# --- routers of experts --------------------------------------------------------------------------

def _router(make: Maker, rng: random.Random) -> Arguments:
    return {"logits": make.randn(make.tokens, 8), "top_k": rng.choice([2, 4]), "ordered": True}


def _biased(make: Maker, rng: random.Random) -> Arguments:
    return _router(make, rng) | {"bias": make.randn(8)}


def _in_groups(draw: Draw) -> Draw:
    def grouped(make: Maker, rng: random.Random) -> Arguments:
        groups, best = rng.choice([(4, 2), (2, 1)])
        return draw(make, rng) | {"groups": [-1, groups, 8 // groups], "flat": [-1, 8],
                                  "top_groups": best}

    return grouped


def _cast_router(make: Maker, rng: random.Random) -> Arguments:
    return _router(make, rng) | {"dtype": make.dtype}


def _given(draw: Draw, **values: object) -> Draw:
    return lambda make, rng: draw(make, rng) | values


def _routed(make: Maker, rng: random.Random) -> Arguments:
    """Of a rule over ``xllm.moe_route`` itself."""
    return {"logits": make.randn(make.tokens, 8), "bias": make.randn(8), "top_k": 4,
            "scoring": "sigmoid", "groups": [4, 2]}


def _with_numbers(make: Maker, rng: random.Random) -> Arguments:
    return _routed(make, rng) | {"normalise": True, "eps": 1e-2, "scale": 2.5}


def _next_logits(result: object, arguments: Arguments) -> Arguments:
    """The weights, side by side until there are as many as experts."""
    copies = aten.cat.default([result[0]] * (8 // arguments["top_k"]), 1)
    wanted = arguments["logits"]
    dtype = wanted.node.meta["val"].dtype if isinstance(wanted, fx.Proxy) else wanted.dtype
    return arguments | {"logits": aten.to.dtype(copies, dtype)}


def _router_entries(found: dict[str, Rewrite]) -> dict[str, Entry]:
    name = "recognise_moe_route."
    narrow = (torch.float32,)
    drawn: dict[str, tuple[Draw, tuple[Draw, ...], tuple[torch.dtype, ...]]] = {
        "softmax": (_router, (), DTYPES),
        "softmax_float32": (_router, (), narrow),
        "softmax_after_top_k": (_cast_router, (), DTYPES),
        "sigmoid": (_biased, (_one_bias,), narrow),
        "sigmoid_in_groups": (_in_groups(_biased), (
            _in_groups(_one_bias), _half_the_experts(_biased)), narrow),
        "softmax_in_groups": (_in_groups(_router), (
            _half_the_experts(_router), _given(_in_groups(_router), flat=[-1, 1, 8])), DTYPES),
        "normalised": (_routed, (), DTYPES),
        "normalised_with_eps": (_given(_routed, eps=1e-2), (), DTYPES),
        "scaled": (_with_numbers, (_given(_with_numbers, scale=2),), DTYPES),
        "cast": (_given(_with_numbers, dtype=torch.bfloat16), (), DTYPES),
    }
    return {name + rule: Entry(found[name + rule], draw, refused, _next_logits, dtypes)
            for rule, (draw, refused, dtypes) in drawn.items()}


def _one_bias(make: Maker, rng: random.Random) -> Arguments:
    return _router(make, rng) | {"bias": make.randn(1)}


def _half_the_experts(draw: Draw) -> Draw:
    """Groups of two rows' experts together."""
    return _given(_in_groups(draw), groups=[-1, 2, 2], top_groups=1)


# --- latent attention ----------------------------------------------------------------------------

def _latent(make: Maker, rng: random.Random) -> Arguments:
    heads, nope, rope, value, rank = rng.choice([(4, 8, 4, 8, 16), (2, 4, 2, 6, 8)])
    both, key, tokens = nope + value, nope + rope, make.tokens
    return {"q": make.randn(1, tokens, heads, key), "k_rope": make.randn(1, 1, tokens, rope),
            "latent": make.randn(1, 1, tokens, rank), "weight": make.randn(heads * both, rank),
            "heads": heads, "both": both, "nope": nope, "value": value, "tokens": tokens,
            "key": key, "scale": 0.3}


def _more_query_heads(make: Maker, rng: random.Random) -> Arguments:
    """Two query heads for each head of keys."""
    arguments = _latent(make, rng)
    heads, key = arguments["heads"], arguments["key"]
    return arguments | {"q": make.randn(1, make.tokens, 2 * heads, key)}


def _one_rotated_value(make: Maker, rng: random.Random) -> Arguments:
    """One number for all rotated features of a key."""
    return _latent(make, rng) | {"k_rope": make.randn(1, 1, make.tokens, 1)}


def _one_rotated_key(make: Maker, rng: random.Random) -> Arguments:
    """One rotated key for all tokens."""
    arguments = _latent(make, rng)
    return arguments | {"k_rope": make.randn(1, 1, 1, arguments["key"] - arguments["nope"])}


def _next_q(result: object, arguments: Arguments) -> Arguments:
    wide = aten.cat.default([result, result], -1)
    return arguments | {"q": aten.slice.Tensor(wide, 3, 0, arguments["key"])}


# --- the table -----------------------------------------------------------------------------------

def _entries() -> dict[str, Entry]:
    found = rules()
    norm = Entry(found["recognise_rms_norm.weight_first"], _norm,
                 (_flat_weight(_norm), _one_weight(_norm), _half_precision), _next_x,
                 (torch.float32,))
    cast = replace(norm, draw=_norm_cast, dtypes=DTYPES, refused=(
        _flat_weight(_norm_cast), _one_weight(_norm_cast), _other_dtype))
    wide = replace(cast, dtypes=(torch.bfloat16,))
    silu = Entry(found["recognise_silu_mul.gate_first"], _silu, (_one_row,), _next_gate)
    write = Entry(found["fuse_qk_norm_rope_kv_write.without_norm"], _write, (_fewer_groups,),
                  _next_qkv)
    table = {
        "absorb_mla.expanded": Entry(
            found["absorb_mla.expanded"], _latent,
            (_more_query_heads, _one_rotated_value, _one_rotated_key), _next_q),
        "recognise_rms_norm.weight_first": norm,
        "recognise_rms_norm.weight_last": norm,
        "recognise_rms_norm.cast_weight_first": cast,
        "recognise_rms_norm.cast_weight_last": cast,
        "recognise_rms_norm.wide_weight_first": wide,
        "recognise_rms_norm.wide_weight_last": wide,
        "norm_before_transpose.transposed_first": Entry(
            found["norm_before_transpose.transposed_first"], _transposed_norm, (_last_moves,),
            _next_x),
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
    table |= _router_entries(found)
    return {name: replace(entry, rule=found[name]) for name, entry in table.items()
            if name in found}


TABLE = _entries()
