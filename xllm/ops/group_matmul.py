"""Mixture of experts, grouped: rows sorted by expert, one matrix product per group.

Every shape is static in tokens and picks: N tokens with K experts each make N K rows, however they
are spread over E experts. Shape legend: N, K, E as said, H hidden size, I expert width, O outputs.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from xllm.ops.core import EXACT, Cost, define, nbytes, randn
from xllm.ops.linear import pack, unpack
from xllm.ops.moe import ACTIVATIONS, gated

_SAME = dict.fromkeys((torch.float32, torch.bfloat16), EXACT)


def group_tokens(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the picks of ``expert_ids [N, K]`` by expert, stable.

    Returns int32 ``rows [N K]``, the token of each sorted row; ``places [N, K]``, the sorted row of
    each pick; ``offsets [E + 1]``: rows ``offsets[e]`` to ``offsets[e + 1]`` belong to expert e.
    """
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device))
    experts = torch.arange(num_experts + 1, device=order.device)
    offsets = torch.searchsorted(flat[order], experts)
    return (order // expert_ids.shape[1]).int(), places.view(expert_ids.shape).int(), offsets.int()


def _fake_group_tokens(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (expert_ids.numel(),), expert_ids.shape, (num_experts + 1,)
    rows, places, offsets = (expert_ids.new_empty(s, dtype=torch.int32) for s in sizes)
    return rows, places, offsets


def group_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor,
                 rows: Tensor | None) -> Tensor:
    """``x[rows[r]] @ weight[e].T + bias[e]`` for each row r of group e → ``[R, O]``.

    ``x [*, H]``, ``weight [E, O, H]``, ``bias [E, O]``, ``offsets [E + 1]`` int32, ``rows [R]``
    int32; without ``rows``, x is sorted already. Rows behind the last offset are zero.
    """
    taken = x if rows is None else x[rows]
    out = taken.new_zeros(taken.shape[0], weight.shape[1])
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if begin < end:
            out[begin:end] = torch.nn.functional.linear(
                taken[begin:end], weight[expert], None if bias is None else bias[expert])
    return out


def _fake_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor,
                 rows: Tensor | None) -> Tensor:
    return x.new_empty((x if rows is None else rows).shape[0], weight.shape[1])


def packed_group_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor,
                        rows: Tensor | None, outputs: int) -> Tensor:
    """:func:`group_matmul` over ``weight [E, O / 32, H / 2, 32, 2]``; O is ``outputs``."""
    return group_matmul(x, unpack(weight, outputs), bias, offsets, rows)


def _fake_packed(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor,
                 rows: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty((x if rows is None else rows).shape[0], outputs)


def gated_activation(both: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """``[..., 2 I]``, gate in the first half and up in the second → ``[..., I]``."""
    gate, up = both.chunk(2, dim=-1)
    return gated(gate, up, activation, limit)


def combine_experts(y: Tensor, places: Tensor, expert_weights: Tensor) -> Tensor:
    """``sum_k expert_weights[n, k] * y[places[n, k]]``: ``[R, H]`` → ``[N, H]``.

    Products have the wider type of both; their sum is in float32.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y[places] * expert_weights.unsqueeze(-1)).to(wide).sum(1).to(y.dtype)


def sample_groups(rng: random.Random) -> tuple[int, int, Tensor]:
    """(tokens, experts, offsets): even groups, empty ones, or one that takes every row."""
    tokens, experts = rng.choice([1, 2, 9, 40]), rng.choice([1, 4, 7, 128])
    some = rng.sample(range(experts), rng.choice([1, min(3, experts), experts]))
    chosen = torch.tensor([rng.choice(some) for _ in range(tokens)])
    return tokens, experts, group_tokens(chosen.unsqueeze(1), experts)[2]


def _sample_group_tokens(rng: random.Random, dtype: torch.dtype) -> tuple:
    experts = rng.choice([4, 7, 128])
    some = rng.sample(range(experts), rng.choice([4, experts]))
    ids = [rng.sample(some, rng.choice([top_k]))
           for top_k in [rng.choice([1, 2, 4])] for _ in range(rng.choice([1, 2, 9, 300]))]
    return torch.tensor(ids), experts


def _sample_matmul(rng: random.Random, dtype: torch.dtype) -> tuple:
    count, experts, offsets = sample_groups(rng)
    width, outputs = rng.choice([8, 64]), rng.choice([3, 32, 80])
    weight = randn(rng, (experts, outputs, width), dtype) / width**0.5
    bias = randn(rng, (experts, outputs), dtype) if rng.random() < 0.3 else None
    if rng.random() < 0.5:
        return randn(rng, (count, width), dtype), weight, bias, offsets, None
    rows = torch.tensor([rng.randrange(5) for _ in range(count)], dtype=torch.int32)
    return randn(rng, (5, width), dtype), weight, bias, offsets, rows


def _sample_packed(rng: random.Random, dtype: torch.dtype) -> tuple:
    x, weight, *rest = _sample_matmul(rng, dtype)
    return x, pack(weight), *rest, weight.shape[1]


def _sample_activation(rng: random.Random, dtype: torch.dtype) -> tuple:
    both = randn(rng, (rng.choice([1, 2, 17]), rng.choice([2, 16, 96])), dtype)
    return both, rng.choice(ACTIVATIONS), rng.choice([None, 1.0])


def _sample_combine(rng: random.Random, dtype: torch.dtype) -> tuple:
    tokens, top_k, width = rng.choice([1, 2, 9]), rng.choice([1, 2, 8]), rng.choice([3, 32, 80])
    order = list(range(tokens * top_k))
    rng.shuffle(order)
    places = torch.tensor(order, dtype=torch.int32).view(tokens, top_k)
    weights = randn(rng, (tokens, top_k), rng.choice([dtype, torch.float32]))
    return randn(rng, (tokens * top_k, width), dtype), places, weights


def _matmul_cost(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor,
                 rows: Tensor | None, outputs: int | None = None) -> Cost:
    """Every group that can be hit is: fewer rows than experts read as many experts as rows."""
    count, outputs = (x if rows is None else rows).shape[0], outputs or weight.shape[1]
    hit = min(count, weight.shape[0])
    moved = count * (x.shape[1] + outputs) * x.element_size() + hit * nbytes(weight[0])
    return Cost(2 * count * x.shape[1] * outputs, moved)


GROUP_TOKENS = define(
    "group_tokens(Tensor expert_ids, int num_experts) -> (Tensor, Tensor, Tensor)",
    group_tokens, fake=_fake_group_tokens, sample=_sample_group_tokens, tolerance=_SAME,
    cost=lambda expert_ids, num_experts: Cost(0, 2 * nbytes(expert_ids) + 4 * num_experts),
)
GROUP_MATMUL = define(
    "group_matmul(Tensor x, Tensor weight, Tensor? bias, Tensor offsets, Tensor? rows) -> Tensor",
    group_matmul, fake=_fake_matmul, sample=_sample_matmul, cost=_matmul_cost,
)
PACKED_GROUP_MATMUL = define(
    "packed_group_matmul(Tensor x, Tensor weight, Tensor? bias, Tensor offsets, Tensor? rows, "
    "int outputs) -> Tensor",
    packed_group_matmul, fake=_fake_packed, sample=_sample_packed, cost=_matmul_cost,
)
GATED_ACTIVATION = define(
    "gated_activation(Tensor both, str activation, float? limit=None) -> Tensor",
    gated_activation, sample=_sample_activation,
    cost=lambda both, *options: Cost(4 * both.numel(), nbytes(both) * 3 // 2),
)
COMBINE_EXPERTS = define(
    "combine_experts(Tensor y, Tensor places, Tensor expert_weights) -> Tensor",
    combine_experts, sample=_sample_combine,
    cost=lambda y, places, weights: Cost(
        2 * y.numel(), nbytes(y) + nbytes(y) // places.shape[1]),
)
