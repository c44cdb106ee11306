"""SamplingParams: defaults, what is refused and how it is named, and the seeds of n answers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from xllm.runtime.sampling_params import RequestError, SamplingParams


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.max_tokens) == (1, 1.0, 1.0, 16)
    assert params.top_k is None and params.logprobs is None and params.stop == ()


@pytest.mark.parametrize("given", [
    {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": -0.1},
    {"temperature": "hot"}, {"temperature": True}, {"top_p": 0}, {"top_p": 1.1},
    {"top_p": math.nan}, {"top_k": -2}, {"top_k": 1.5}, {"min_p": -0.1}, {"min_p": 2},
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.0}, {"n": 0}, {"n": 10**6},
    {"seed": 1 << 64}, {"seed": 0.5}, {"logprobs": -1}, {"logprobs": 21}, {"stop": ""},
    {"stop": ["a", ""]}, {"stop": [1]}, {"stop": ["a"] * 65}, {"stop_token_ids": [-1]},
    {"stop_token_ids": ["a"]},
])
def test_refusals_name_the_parameter(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**given)
    assert caught.value.param == name and "accepted" in str(caught.value)


def test_spellings_are_normalised() -> None:
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=None, stop_token_ids=None).stop_token_ids == ()
    assert SamplingParams(top_k=-1).top_k is SamplingParams(top_k=0).top_k is None
    assert SamplingParams(temperature=1e-9).greedy and not SamplingParams(temperature=0.1).greedy


def test_answers_have_seeds_of_their_own() -> None:
    top = (1 << 63) - 1
    children = [SamplingParams(n=3, seed=top).for_choice(index) for index in range(3)]
    assert [child.seed for child in children] == [top, -top - 1, -top]
    assert all(child.n == 1 for child in children)
    assert SamplingParams(n=2).for_choice(1).seed is None
