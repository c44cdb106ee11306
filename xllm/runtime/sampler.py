"""Choose tokens from logits: greedy rows all at once, the others by one seeded draw each.

A row's choice depends on its own logits, params and generator only, never on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xllm.runtime.sampling_params import SamplingParams

NUCLEUS_GUESS = 256  # top-p mostly keeps fewer tokens than this


class SamplingError(RuntimeError):
    """A row from which no token can be chosen."""


@dataclass(frozen=True)
class Alternative:
    """A token and its log probability under the model's distribution; the likeliest ranks 1."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class Sampled:
    """The chosen token; if logprobs were asked for, the chosen one first, then the likeliest."""

    token_id: int
    alternatives: tuple[Alternative, ...] | None = None


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """The source of one request's draws, seeded by the request or at random; greedy needs none."""
    if params.greedy:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


class Sampler:
    """One step's logits, float32 ``[R, V]``."""

    def __init__(self, logits: Tensor) -> None:
        self.logits_RV = logits
        best = logits.max(dim=-1)
        self._argmax: list[int] = best.indices.tolist()
        self._finite: list[bool] = best.values.isfinite().tolist()

    def choose(
        self, row: int, params: SamplingParams, generator: torch.Generator | None
    ) -> Sampled:
        """Draw one row's token; raises :class:`SamplingError`."""
        if not self._finite[row]:
            raise SamplingError("the model's logits are not finite")
        token_id = self._argmax[row]
        if generator is not None:
            token_id = draw(self.logits_RV[row], params, generator)
        if params.logprobs is None:
            return Sampled(token_id)
        return Sampled(token_id, alternatives(self.logits_RV[row], token_id, params.logprobs))


def draw(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Sample one row: temperature, min-p, top-k, top-p, in vLLM's order, then one uniform draw."""
    weights_V = ((logits_V - logits_V.max()) / params.temperature).exp()  # the likeliest has 1
    weights_V = torch.where(weights_V < params.min_p, 0.0, weights_V)
    size = len(weights_V) if params.top_k is None else min(params.top_k, len(weights_V))
    if params.top_p < 1:
        weights_C, tokens_C = _nucleus(weights_V, size, params.top_p)
    elif size < len(weights_V):
        weights_C, tokens_C = weights_V.topk(size)
    else:
        weights_C, tokens_C = weights_V, torch.arange(size, device=weights_V.device)
    cumulative_C = weights_C.cumsum(0, dtype=torch.float64)
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    drawn = uniform.to(cumulative_C.device) * cumulative_C[-1]
    return int(tokens_C[int((cumulative_C <= drawn).sum())])


def _nucleus(weights_V: Tensor, size: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest of the ``size`` likeliest tokens that hold ``top_p`` of their weight.

    Weights and ids, likeliest first; sorts no more of the vocabulary than it takes.
    """
    whole = size == len(weights_V)
    total = float((weights_V if whole else weights_V.topk(size).values).sum(dtype=torch.float64))
    tried = min(NUCLEUS_GUESS, size)
    while True:
        weights_C, tokens_C = weights_V.topk(tried)
        before_C = weights_C.cumsum(0, dtype=torch.float64) - weights_C
        kept = int((before_C < top_p * total).sum())
        if kept < tried or tried == size:
            return weights_C[:kept], tokens_C[:kept]
        tried = min(tried * 16, size)


def alternatives(logits_V: Tensor, token_id: int, count: int) -> tuple[Alternative, ...]:
    """The chosen token, then the ``count`` likeliest, the chosen one not repeated."""
    logprobs_V = logits_V.double().log_softmax(dim=-1)
    own = float(logprobs_V[token_id])
    found = [Alternative(token_id, own, int((logprobs_V > own).sum()) + 1)]
    values, tokens = logprobs_V.topk(min(count, len(logprobs_V)))
    for rank, (value, token) in enumerate(zip(values.tolist(), tokens.tolist()), start=1):
        if token != token_id:
            found.append(Alternative(token, value, rank))
    return tuple(found)
