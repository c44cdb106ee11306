"""Choose tokens from logits: greedy rows all at once, the others by one seeded draw each.

A row's choice depends on its own logits, params and generator only, never on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xllm.runtime.sampling_params import SamplingParams


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
        self._logits_RV = logits
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
            token_id = draw(self._logits_RV[row], params, generator)
        if params.logprobs is None:
            return Sampled(token_id)
        return Sampled(token_id, alternatives(self._logits_RV[row], token_id, params.logprobs))


def draw(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Sample one row: temperature, min-p, top-k, top-p, in vLLM's order, then one uniform draw."""
    probs_C, tokens_C = _candidates(logits_V, params)
    cumulative_C = probs_C.cumsum(0)
    if params.top_p < 1:
        kept = int((cumulative_C - probs_C < params.top_p * cumulative_C[-1]).sum())
        cumulative_C = cumulative_C[:kept]
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    position = torch.searchsorted(cumulative_C, uniform * cumulative_C[-1], right=True)
    return int(tokens_C[min(int(position), len(cumulative_C) - 1)])


def _candidates(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Unnormalised probabilities (float64) and ids of the tokens that top-k and min-p leave.

    Ordered from the likeliest on if top-k or top-p asks for it. The largest is 1, so that
    ``exp`` cannot overflow at any temperature.
    """
    scaled_V = logits_V.double()
    scaled_V = (scaled_V - scaled_V.max()) / params.temperature
    tokens_C = torch.arange(len(scaled_V))
    if params.top_k is not None and params.top_k < len(scaled_V):
        scaled_V, tokens_C = scaled_V.topk(params.top_k)
    elif params.top_p < 1:
        scaled_V, tokens_C = scaled_V.sort(descending=True, stable=True)
    probs_C = scaled_V.exp()
    kept_C = (probs_C > 0) & (probs_C >= params.min_p)
    return probs_C[kept_C], tokens_C[kept_C]


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
