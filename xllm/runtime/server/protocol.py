"""The OpenAI API's request bodies; ranges are checked by SamplingParams, types here.

Unknown fields are ignored, as OpenAI's clients expect of compatible servers; known ones that we
do not serve, and that would change the answer, are refused unless they ask for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from xllm.runtime.sampling_params import MAX_LOGPROBS, RequestError, SamplingParams

# Field -> the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "web_search_options": (),
}


def refuse_unsupported(extra: dict[str, Any] | None, param: str | None = None) -> None:
    """Raise RequestError, for ``param`` or the field itself, if a field asks for what we lack."""
    for name, value in (extra or {}).items():
        neutral = UNSUPPORTED.get(name)
        if neutral is not None and value is not None and value not in neutral:
            raise RequestError(f"{name} is not supported", param or name)


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both kinds of completion share; null means the field's default."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The request's params, with what the two kinds of completion do differently."""
        refuse_unsupported(self.model_extra)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true",
                               "stream_options")
        names = ("temperature", "top_p", "top_k", "min_p", "n", "seed", "stop",
                 "stop_token_ids", "ignore_eos")
        given = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


class TextPart(BaseModel):
    """One part of a message's content."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """Where an image is; ``detail`` is a hint that changes nothing."""

    model_config = ConfigDict(strict=True)
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(BaseModel):
    """An image in a message's content."""

    model_config = ConfigDict(strict=True)
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def images(self) -> list[str]:
        """URLs of the images, in order."""
        parts = () if isinstance(self.content, str) else self.content
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``; without a limit, answers run to the context's end."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def to_params(self) -> SamplingParams:
        """Raises RequestError naming the field at fault."""
        for message in self.messages:
            refuse_unsupported(message.model_extra, "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true", "top_logprobs")
        wanted = self.top_logprobs or 0
        if not 0 <= wanted <= MAX_LOGPROBS:
            raise RequestError(
                f"top_logprobs is {wanted}; accepted: 0 to {MAX_LOGPROBS}", "top_logprobs")
        limit = self.max_completion_tokens
        if limit is None:
            limit = self.max_tokens
        return self.sampling_params(limit, wanted if self.logprobs else None)


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``; ``prompt`` is a text, token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None

    def to_params(self) -> SamplingParams:
        """Raises RequestError naming the field at fault."""
        if self.echo and self.logprobs is not None:
            raise RequestError("logprobs are not supported together with echo", "logprobs")
        limit = 16 if self.max_tokens is None else self.max_tokens
        return self.sampling_params(limit, self.logprobs)
