"""Replies: what JSON cannot say, and which alternatives a chat's logprobs list."""

from __future__ import annotations

import json
import math

from xllm.runtime.outputs import CompletionOutput, Logprob
from xllm.runtime.request import Prompt
from xllm.runtime.sampling_params import SamplingParams
from xllm.runtime.server.replies import ChatReply, CompletionReply

CHOSEN, OTHER = Logprob(-math.inf, 5, "c"), Logprob(-0.5, 1, "é")
OUTPUT = CompletionOutput(0, [7], "c", "length", logprobs=[{7: CHOSEN, 8: OTHER}])


def test_infinite_logprobs_become_numbers() -> None:
    prompt = Prompt([1], SamplingParams(logprobs=1))
    for reply in (ChatReply("m", prompt), CompletionReply("m", [prompt], echo=False)):
        text = json.dumps(reply.whole([OUTPUT]), allow_nan=False)
        assert "-9999.0" in text


def test_a_chosen_token_is_listed_only_among_the_likeliest() -> None:
    for top, listed in ((0, []), (1, ["é"]), (2, ["é", "c"])):
        reply = ChatReply("m", Prompt([1], SamplingParams(logprobs=top)))
        (token,) = reply.choice(OUTPUT)["logprobs"]["content"]
        assert token["token"] == "c" and [item["token"] for item in token["top_logprobs"]] == listed
        assert all(item["bytes"] == list(item["token"].encode()) for item in token["top_logprobs"])
