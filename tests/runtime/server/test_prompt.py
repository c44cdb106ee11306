"""Prompts: the template's own variables, and tokenizers without a template."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from xllm.runtime.sampling_params import RequestError, SamplingParams
from xllm.runtime.server.prompt import chat_prompt, completion_prompts
from xllm.runtime.server.protocol import ChatRequest, CompletionRequest

PARAMS = SamplingParams()


def chat(**extra: object) -> ChatRequest:
    return ChatRequest(messages=[{"role": "user", "content": "hi"}], **extra)


def test_the_template_is_rendered_and_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = chat_prompt(tokenizer, chat(), PARAMS)
    assert prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.token_ids == [256, *b"user\nhi", 257, 10, 256, *b"assistant\n"]
    assert prompt.params is PARAMS


def test_template_variables(tokenizer: PreTrainedTokenizerFast) -> None:
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = "{{ 'think' if enable_thinking else 'answer' }}"
    request = chat(chat_template_kwargs={"enable_thinking": True})
    assert chat_prompt(thinking, request, PARAMS).text == "think"
    assert chat_prompt(thinking, chat(), PARAMS).text == "answer"


def test_without_a_template_chat_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(RequestError, match="no chat template; /v1/completions"):
        chat_prompt(plain, chat(), PARAMS)


def test_completion_prompts_keep_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for echo, text in ((None, None), (True, "hi")):
        request = CompletionRequest(prompt=[[104, 105]], echo=echo)
        (prompt,) = completion_prompts(tokenizer, request, PARAMS)
        assert (prompt.token_ids, prompt.text) == ([104, 105], text)
    (prompt,) = completion_prompts(tokenizer, CompletionRequest(prompt="é"), PARAMS)
    assert (prompt.token_ids, prompt.text) == ([0xC3, 0xA9], "é")
