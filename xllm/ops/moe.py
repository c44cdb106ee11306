"""Mixture of experts: the captured form, one op per layer.

Shape legend: N tokens, K experts per token, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from xllm.ops.core import Cost, define, nbytes, randn

#: Gated activations by name: gate, up, limit → ``[..., I]``. ``swiglu_oai`` is GPT-OSS's.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "swiglu_oai")


def gated(gate: Tensor, up: Tensor, activation: str, limit: float | None) -> Tensor:
    """``act(gate) * up``; with ``limit``, gate is clamped from above and up on both sides first."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    match activation:
        case "silu":
            return torch.nn.functional.silu(gate) * up
        case "gelu":
            return torch.nn.functional.gelu(gate) * up
        case "gelu_tanh":
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        case "relu":
            return torch.nn.functional.relu(gate) * up
        case "swiglu_oai":
            return (up + 1) * (gate * torch.sigmoid(1.702 * gate))
    raise ValueError(f"activation is {activation!r}; accepted: {', '.join(ACTIVATIONS)}")


def experts(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str,
    limit: float | None = None, interleaved: bool = False, transposed: bool = False,
) -> Tensor:
    """``sum_k expert_weights[n, k] * expert_{expert_ids[n, k]}(x[n])`` → ``[N, H]``.

    ``x [N, H]``; ``expert_ids, expert_weights [N, K]``; ``gate_up [E, 2 I, H]``, ``down [E, H,
    I]`` (``transposed``: last two dimensions exchanged); ``gate_up_bias [E, 2 I]``, ``down_bias
    [E, H]``. Gate and up are halves of the first projection, or its even and odd features where
    ``interleaved``. The sum over k is in float32. Source: Shazeer et al. 2017.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=wide)
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    for expert in range(gate_up.shape[0]):
        rows, picks = (expert_ids == expert).nonzero(as_tuple=True)
        if not len(rows):
            continue
        bias = (None if gate_up_bias is None else gate_up_bias[expert],
                None if down_bias is None else down_bias[expert])
        both = torch.nn.functional.linear(x[rows], gate_up[expert], bias[0])
        gate, up = (both[..., ::2], both[..., 1::2]) if interleaved else both.chunk(2, dim=-1)
        hidden = gated(gate, up, activation, limit)
        result = torch.nn.functional.linear(hidden, down[expert], bias[1])
        out.index_add_(0, rows, (result * expert_weights[rows, picks, None]).to(wide))
    return out.to(x.dtype)


def _fake_experts(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(x)


def _sample_experts(rng: random.Random, dtype: torch.dtype) -> tuple:
    tokens, experts_, top_k = rng.choice([1, 2, 9]), rng.choice([4, 7]), rng.choice([1, 2, 3])
    hidden, width = rng.choice([8, 32]), rng.choice([8, 48])
    ids = torch.stack([torch.tensor(rng.sample(range(experts_), top_k)) for _ in range(tokens)])
    weights = randn(rng, (tokens, top_k), torch.float32).softmax(-1).to(dtype)
    turned = rng.random() < 0.3
    shapes = [(experts_, 2 * width, hidden), (experts_, hidden, width)]
    gate_up, down = (randn(rng, (s[0], s[2], s[1]) if turned else s, dtype) / s[2] ** 0.5
                     for s in shapes)
    with_bias = rng.random() < 0.3
    bias = [randn(rng, s[:2], dtype) if with_bias else None for s in shapes]
    limit = rng.choice([None, None, 1.0])
    return (randn(rng, (tokens, hidden), dtype), ids, weights, gate_up, down, *bias,
            rng.choice(ACTIVATIONS), limit, rng.random() < 0.3, turned)


def _experts_cost(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor,
                  down: Tensor, *options: object) -> Cost:
    picks = expert_ids.numel()
    per_expert = (gate_up[0].numel() + down[0].numel())
    hit = min(picks, gate_up.shape[0])
    return Cost(2 * picks * per_expert, nbytes(x, x) + hit * per_expert * gate_up.element_size())


EXPERTS = define(
    "experts(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, float? limit=None, "
    "bool interleaved=False, bool transposed=False) -> Tensor",
    experts, fake=_fake_experts, sample=_sample_experts, cost=_experts_cost,
)
