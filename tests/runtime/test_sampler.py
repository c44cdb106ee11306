"""Sampling: exact argmax, the distribution asked for, the same draws whatever the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.runtime.sampler import Sampler, SamplingError, draw, make_generator
from xllm.runtime.sampling_params import SamplingParams

LOGITS_V = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def draws(logits_V: torch.Tensor, count: int, **asked: Any) -> list[int]:
    params = SamplingParams(**{"seed": 7, **asked})
    generator = make_generator(params)
    assert generator is not None
    return [draw(logits_V, params, generator) for _ in range(count)]


def filtered(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probabilities by the book: float64, full sorts, one filter after the other."""
    probs_V = (logits_V.double() / params.temperature).softmax(0)
    probs_V[probs_V < params.min_p * probs_V.max()] = 0
    order_V = probs_V.argsort(descending=True)
    if params.top_k is not None:
        probs_V[order_V[params.top_k :]] = 0
    probs_V /= probs_V.sum()
    before_V = probs_V[order_V].cumsum(0) - probs_V[order_V]
    probs_V[order_V[before_V >= params.top_p]] = 0
    return probs_V / probs_V.sum()


def test_greedy_is_argmax_in_one_batch() -> None:
    logits_RV = torch.randn(32, 1000)
    sampler, params = Sampler(logits_RV), SamplingParams(temperature=0)
    chosen = [sampler.choose(row, params, make_generator(params)).token_id for row in range(32)]
    assert chosen == logits_RV.argmax(-1).tolist()


@pytest.mark.parametrize("asked", [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 2}, {"top_k": 1}, {"top_k": 99},
    {"top_p": 0.9}, {"top_p": 0.05}, {"top_p": 1e-9}, {"min_p": 0.2}, {"min_p": 1.0},
    {"top_k": 3, "top_p": 0.8, "min_p": 0.1, "temperature": 1.5},
])
def test_distribution(asked: dict[str, Any]) -> None:
    expected_V = filtered(LOGITS_V, SamplingParams(**asked))
    counts_V = torch.bincount(torch.tensor(draws(LOGITS_V, 3000, **asked)), minlength=5)
    assert not counts_V[expected_V == 0].any()
    assert (counts_V / 3000 - expected_V).abs().max() < 0.04  # > 4 standard deviations


@settings(deadline=None)  # machines are busy
@given(st.integers(0, 2**31), st.floats(0.05, 0.99), st.sampled_from([None, 5, 400, 1000]))
def test_nucleus_sorts_no_more_than_it_must_and_keeps_the_same(
    seed: int, top_p: float, top_k: int | None
) -> None:
    logits_V = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(top_p=top_p, top_k=top_k, seed=seed, temperature=5.0)
    kept_V = filtered(logits_V, replace(params, top_p=top_p + 1e-6)) > 0  # float32's rounding
    generator = make_generator(params)
    assert generator is not None
    assert all(kept_V[draw(logits_V, params, generator)] for _ in range(20))


def test_a_seed_gives_the_same_draws_in_any_batch() -> None:
    logits_RV = torch.randn(8, 500)
    params = SamplingParams(seed=3, top_p=0.95)
    alone = [Sampler(logits_RV[row : row + 1]).choose(0, params, make_generator(params))
             for row in range(8)]
    together = Sampler(logits_RV)
    assert alone == [together.choose(row, params, make_generator(params)) for row in range(8)]
    assert draws(LOGITS_V, 50) == draws(LOGITS_V, 50)
    assert draws(LOGITS_V, 50) != draws(LOGITS_V, 50, seed=8)


def test_without_a_seed_draws_differ() -> None:
    params = SamplingParams()
    first, second = make_generator(params), make_generator(params)
    assert first is not None and second is not None
    assert first.initial_seed() != second.initial_seed()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e30])
def test_extreme_logits_and_masked_tokens(scale: float) -> None:
    logits_V = torch.tensor([-torch.inf, 3.0 * scale, 2.0 * scale])
    assert 0 not in draws(logits_V, 100, temperature=1e-4 if scale > 1 else 1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits_RV = torch.stack([LOGITS_V, LOGITS_V])
    logits_RV[0, 2] = bad
    sampler, params = Sampler(logits_RV), SamplingParams(temperature=0)
    with pytest.raises(SamplingError, match="not finite"):
        sampler.choose(0, params, None)
    assert sampler.choose(1, params, None).token_id == 1


def test_logprobs() -> None:
    params = SamplingParams(logprobs=2, top_k=1, temperature=0.3)
    expected_V = LOGITS_V.log_softmax(0)
    found = Sampler(LOGITS_V.unsqueeze(0)).choose(0, params, make_generator(params)).alternatives
    assert found is not None and [(a.token_id, a.rank) for a in found] == [(1, 1), (2, 2)]
    for item in found:  # of the model's distribution, whatever the temperature
        assert item.logprob == pytest.approx(float(expected_V[item.token_id]), abs=1e-5)


def test_the_chosen_token_comes_first_and_is_not_repeated() -> None:
    params = SamplingParams(logprobs=1, temperature=50.0, seed=0)
    generator = make_generator(params)
    sampler = Sampler(LOGITS_V.unsqueeze(0))
    seen = {tuple((a.token_id, a.rank) for a in sampler.choose(0, params, generator).alternatives)
            for _ in range(200)}
    assert seen == {((1, 1),), *(((token, rank), (1, 1)) for token, rank in
                                ((2, 2), (0, 3), (3, 4), (4, 5)))}
    none = SamplingParams(logprobs=0, temperature=0)
    assert len(sampler.choose(0, none, None).alternatives) == 1
