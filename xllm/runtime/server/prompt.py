"""From a request's messages or prompt to token ids."""

from __future__ import annotations

import inspect

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from xllm.runtime.request import Prompt
from xllm.runtime.sampling_params import RequestError, SamplingParams
from xllm.runtime.server.protocol import ChatRequest, CompletionRequest, Message

_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters)


def chat_prompt(
    tokenizer: PreTrainedTokenizerFast, request: ChatRequest, params: SamplingParams
) -> Prompt:
    """Render the conversation by the model's chat template; raises RequestError."""
    if not request.messages:
        raise RequestError("messages is empty; accepted: at least one message", "messages")
    if tokenizer.chat_template is None:
        raise RequestError(
            "the model has no chat template; /v1/completions takes plain prompts", "messages")
    extra = request.chat_template_kwargs or {}
    if reserved := sorted(_RESERVED & set(extra)):
        raise RequestError(
            f"chat_template_kwargs may not hold {', '.join(reserved)}", "chat_template_kwargs")
    conversation = [_turn(message) for message in request.messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **extra)
    except (TemplateError, TypeError, ValueError) as error:
        raise RequestError(f"the chat template refuses these messages: {error}", "messages")
    token_ids = _encode(tokenizer, text, "messages", add_special_tokens=False)
    return Prompt(token_ids, params, text)


def _encode(
    tokenizer: PreTrainedTokenizerFast, text: str, param: str, add_special_tokens: bool
) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{param} is not valid Unicode: {error.reason}", param)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _turn(message: Message) -> dict[str, str]:
    content = message.content
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": content}


def completion_prompts(
    tokenizer: PreTrainedTokenizerFast, request: CompletionRequest, params: SamplingParams
) -> list[Prompt]:
    """The prompts of a completion request, one or more; raises RequestError."""
    prompt = request.prompt
    if not prompt:
        raise RequestError("prompt is empty; accepted: a text, token ids, or a list of either",
                           "prompt")
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    return [_completion_prompt(tokenizer, item, params, bool(request.echo)) for item in prompt]


def _completion_prompt(
    tokenizer: PreTrainedTokenizerFast, item: str | list[int], params: SamplingParams, echo: bool
) -> Prompt:
    if isinstance(item, str):
        return Prompt(_encode(tokenizer, item, "prompt", add_special_tokens=True), params, item)
    size = len(tokenizer)
    if echo and all(0 <= token_id < size for token_id in item):
        return Prompt(item, params, tokenizer.decode(item))
    return Prompt(item, params)  # ids out of range are the engine's to refuse
