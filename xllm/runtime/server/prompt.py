"""From a request's messages or prompt to token ids."""

from __future__ import annotations

import inspect
from dataclasses import replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from xllm.runtime.request import Prompt
from xllm.runtime.sampling_params import Params, RequestError, SamplingParams
from xllm.runtime.server.images import Vision
from xllm.runtime.server.protocol import ChatRequest, CompletionRequest, Message, TextPart

_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters)


def chat_prompt(
    tokenizer: PreTrainedTokenizerFast, request: ChatRequest, params: SamplingParams,
    vision: Vision | None = None,
) -> Prompt:
    """Render the conversation by the model's chat template; raises RequestError."""
    if not request.messages:
        raise RequestError("messages is empty; accepted: at least one message", "messages")
    if tokenizer.chat_template is None:
        raise RequestError(
            "the model has no chat template; /v1/completions takes plain prompts", "messages")
    urls = [url for message in request.messages for url in message.images]
    if urls and vision is None:
        raise RequestError("messages hold an image; the model takes text only", "messages")
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
    if not urls:
        return Prompt(token_ids, params, text)
    token_ids, images = vision.place(token_ids, urls)
    return Prompt(token_ids, params, text, images)


def check_text(text: str, param: str) -> None:
    """Raise RequestError for text that no tokenizer takes: lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{param} is not valid Unicode: {error.reason}", param)


def _encode(
    tokenizer: PreTrainedTokenizerFast, text: str, param: str, add_special_tokens: bool
) -> list[int]:
    check_text(text, param)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _turn(message: Message) -> dict[str, object]:
    content: object = message.content
    if message.images:
        content = [{"type": "text", "text": part.text} if isinstance(part, TextPart)
                   else {"type": "image"} for part in message.content]
    elif not isinstance(content, str):
        content = "".join(part.text for part in message.content)
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": content}


def plain_prompts(
    tokenizer: PreTrainedTokenizerFast, given: str | list[str] | list[int] | list[list[int]],
    param: str, params: Params,
) -> list[Prompt]:
    """Prompts without a chat template, one or more; raises RequestError."""
    if not given:
        raise RequestError(f"{param} is empty; accepted: a text, token ids, or a list of either",
                           param)
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    return [
        Prompt(_encode(tokenizer, item, param, add_special_tokens=True), params, item)
        if isinstance(item, str) else Prompt(item, params)
        for item in given
    ]


def completion_prompts(
    tokenizer: PreTrainedTokenizerFast, request: CompletionRequest, params: SamplingParams
) -> list[Prompt]:
    """The prompts of a completion request, with the texts to echo; raises RequestError."""
    prompts = plain_prompts(tokenizer, request.prompt, "prompt", params)
    return [_with_text(tokenizer, prompt) for prompt in prompts] if request.echo else prompts


def _with_text(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> Prompt:
    size = len(tokenizer)
    if prompt.text is None and all(0 <= token_id < size for token_id in prompt.token_ids):
        return replace(prompt, text=tokenizer.decode(prompt.token_ids))
    return prompt  # ids out of range are the engine's to refuse
