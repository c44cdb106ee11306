"""Routing: which experts a token goes to, and with which weights.

Shape legend: N tokens, K experts per token, E experts, G groups of experts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from xllm.ops.core import Cost, define, nbytes, randn

#: How logits become scores: over all experts, each for itself, or over the chosen ones only.
SCORINGS = ("softmax", "sigmoid", "softmax_after_top_k")


def _in_best_groups(scores: Tensor, groups: int, best: int, scoring: str) -> Tensor:
    """``scores [N, E]`` with those outside the best groups out of reach."""
    grouped = scores.unflatten(-1, (groups, -1))
    if scoring == "softmax":
        of_group, fill = grouped.amax(-1), 0.0
    else:
        of_group, fill = grouped.topk(2, -1).values.sum(-1), float("-inf")
    chosen = of_group.topk(best, -1).indices
    kept = torch.zeros_like(of_group, dtype=torch.bool).scatter(1, chosen, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), fill).flatten(-2)


def moe_route(
    logits: Tensor, bias: Tensor | None, top_k: int, scoring: str, groups: Sequence[int] = (1, 1),
    normalise: bool = False, eps: float = 0.0, scale: float = 1.0, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``top_k`` experts of each row of ``logits [N, E]``: weights ``[N, K]``, ids ``[N, K]``.

    Scores are in float32. ``bias [E]`` is added to them for the choice, not for the weights
    (DeepSeek-V3, 2024). ``groups`` = (G, best): only experts of the best groups can be chosen; a
    group has the score of its best expert (softmax; DeepSeek-V2, 2024), or the sum of its best two
    (sigmoid). ``normalise`` divides the weights by their sum plus ``eps``; ``scale`` multiplies
    them. ``softmax_after_top_k`` is in the dtype of the logits and knows neither bias nor groups.
    The weights have ``dtype``, or else that of the scores.
    """
    if scoring == "softmax_after_top_k":
        best = logits.topk(top_k, -1)
        weights, ids = torch.softmax(best.values, -1), best.indices
    else:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
        choice = scores if bias is None else scores + bias
        if groups[0] > 1:
            choice = _in_best_groups(choice, *groups, scoring)
        best = choice.topk(top_k, -1)
        ids = best.indices
        weights = best.values if bias is None else scores.gather(1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * scale).to(dtype or weights.dtype), ids


def _fake_route(
    logits: Tensor, bias: Tensor | None, top_k: int, scoring: str, groups: Sequence[int] = (1, 1),
    normalise: bool = False, eps: float = 0.0, scale: float = 1.0, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    own = logits.dtype if scoring == "softmax_after_top_k" else wide
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=dtype or own), logits.new_empty(shape, dtype=torch.int64)


def _sample(rng: random.Random, dtype: torch.dtype) -> tuple:
    tokens, experts, top_k = rng.choice([1, 2, 9]), rng.choice([8, 64]), rng.choice([1, 2, 4])
    scoring = rng.choice(SCORINGS)
    bias = randn(rng, (experts,), torch.float32) if scoring == "sigmoid" else None
    groups = rng.choice([(1, 1), (4, 2), (2, 1)]) if scoring != "softmax_after_top_k" else (1, 1)
    norm = (True, rng.choice([0.0, 1e-20])) if rng.random() < 0.5 else (False, 0.0)
    return (randn(rng, (tokens, experts), dtype), bias, top_k, scoring, list(groups), *norm,
            rng.choice([1.0, 2.5]), rng.choice([None, dtype]))


MOE_ROUTE = define(
    "moe_route(Tensor logits, Tensor? bias, int top_k, str scoring, int[2] groups=[1, 1], "
    "bool normalise=False, float eps=0., float scale=1., ScalarType? dtype=None) "
    "-> (Tensor, Tensor)",
    moe_route, fake=_fake_route, sample=_sample,
    cost=lambda logits, bias, top_k, *options: Cost(
        8 * logits.numel(), nbytes(logits) + 12 * logits.shape[0] * top_k),
)
