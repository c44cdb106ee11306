"""Recognise multi-head latent attention (DeepSeek V2/V3, MiniCPM3, GLM-4-MoE-Lite, Youtu).

    %kv = aten.linear(%latent, %kv_b_weight); keys and values are views of %kv
    %k = aten.new_empty(...); keys and %k_rope, the same for all heads, are copied into %k
    %o = xllm.attention(%q, %k, %v, scale)
    ->   %o = xllm.latent_attention(q_nope, q_rope, %latent, %k_rope, %kv_b_weight, scale)

Paging then caches the latent and ``k_rope`` instead of every head's keys and values, and turns the
weight, which the op takes as stored, into the two matrices that query and result absorb. How
``k_rope`` was rotated plays no part. Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.

Level: captured -> captured. Numerics: exact (the op's meaning is the expanded form).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import Match, Rewrite, apply

aten = torch.ops.aten
xllm = torch.ops.xllm
END = 2**63 - 1


def expanded(q: Tensor, k_rope: Tensor, latent: Tensor, weight: Tensor, heads: int, both: int,
             nope: int, value: int, tokens: int, key: int, scale: float) -> Tensor:
    kv = aten.view.default(aten.linear.default(latent, weight), [1, -1, heads, both])
    kv = aten.transpose.int(kv, 1, 2)
    parts = aten.split_with_sizes.default(kv, [nope, value], -1)
    shared = aten.expand.default(k_rope, [-1, heads, -1, -1])
    k = aten.new_empty.default(kv, [1, heads, tokens, key], pin_memory=False)
    aten.copy_.default(aten.slice.Tensor(k, 3, 0, nope), parts[0])
    aten.copy_.default(aten.slice.Tensor(k, 3, nope, END), shared)
    k, v = aten.transpose.int(k, 1, 2), aten.transpose.int(parts[1], 1, 2)
    return xllm.attention.default(q, k, v, scale)


def latent_attention(q: Tensor, k_rope: Tensor, latent: Tensor, weight: Tensor, heads: int,
                     both: int, nope: int, value: int, tokens: int, key: int,
                     scale: float) -> Tensor:
    q_nope, q_rope = aten.slice.Tensor(q, 3, 0, nope), aten.slice.Tensor(q, 3, nope, key)
    shared = aten.squeeze.dim(latent, 1), aten.squeeze.dim(k_rope, 1)
    return xllm.latent_attention.default(q_nope, q_rope, *shared, weight, scale)


def _is_latent(match: Match) -> bool:
    """One latent and one rotated key per token, for all heads."""
    q, k_rope, latent = (match.val(name).shape for name in ("q", "k_rope", "latent"))
    heads, both, nope, key = (match.binding[n] for n in ("heads", "both", "nope", "key"))
    weight = match.val("weight").shape
    return (len(q) == len(k_rope) == len(latent) == 4 and len(weight) == 2
            and weight[0] == heads * both and tuple(q[2:]) == (heads, key)
            and latent[1] == k_rope[1] == 1 and latent[2] == k_rope[2] == q[1]
            and k_rope[3] == key - nope)


RULES = (Rewrite(expanded, latent_attention, _is_latent),)


def absorb_mla(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Recognise multi-head latent attention."""
    return apply(RULES, gm)


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return model.num_latent_attentions
