"""The OpenAI API's response bodies, whole and in chunks, as plain JSON values."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from xllm.runtime.outputs import CompletionOutput, Delta, Logprob
from xllm.runtime.request import Prompt

Json = dict[str, Any]


class Reply(ABC):
    """One HTTP request's response; answers are numbered as :class:`Generation` does."""

    whole_object: str
    chunk_object: str

    def __init__(self, prefix: str, model: str, prompts: Sequence[Prompt]) -> None:
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)

    def whole(self, outputs: Sequence[CompletionOutput]) -> Json:
        """The body of a response that is not streamed."""
        return {
            **self._head,
            "object": self.whole_object,
            "choices": [self.choice(output) for output in outputs],
            "usage": self._usage(sum(len(output.token_ids) for output in outputs)),
        }

    def chunk(self, choices: list[Json]) -> Json:
        """One event of a stream."""
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def usage_chunk(self, completion_tokens: int) -> Json:
        """The event that reports token counts at the end of a stream."""
        return {**self.chunk([]), "usage": self._usage(completion_tokens)}

    def _usage(self, completion_tokens: int) -> Json:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }

    @abstractmethod
    def choice(self, output: CompletionOutput) -> Json:
        """One whole answer."""

    @abstractmethod
    def opening(self, answer: int) -> list[Json]:
        """The choice of a stream's first event for an answer, if it has one."""

    @abstractmethod
    def piece(self, answer: int, delta: Delta) -> Json:
        """The choice of a stream's event for one delta."""


class ChatReply(Reply):
    """``chat.completion``."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, prompt: Prompt) -> None:
        super().__init__("chatcmpl", model, [prompt])
        self._top = prompt.params.logprobs or 0

    def choice(self, output: CompletionOutput) -> Json:
        """A message with its finish reason and logprobs."""
        return {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text},
            "logprobs": _chat_logprobs(output.token_ids, output.logprobs, self._top),
            "finish_reason": output.finish_reason,
        }

    def opening(self, answer: int) -> list[Json]:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": answer, "delta": delta, "logprobs": None, "finish_reason": None}]

    def piece(self, answer: int, delta: Delta) -> Json:
        """A piece of the content."""
        return {
            "index": answer,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": _chat_logprobs(delta.token_ids, delta.logprobs, self._top),
            "finish_reason": delta.finish_reason,
        }


class CompletionReply(Reply):
    """``text_completion``; with ``echo`` each answer begins with its prompt."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, model: str, prompts: Sequence[Prompt], echo: bool) -> None:
        super().__init__("cmpl", model, prompts)
        texts = [prompt.text for prompt in prompts for _ in range(prompt.params.n)]
        self._echoes = [text if echo and text is not None else "" for text in texts]
        self._text_lengths = [0] * len(texts)

    def choice(self, output: CompletionOutput) -> Json:
        """A text with its finish reason and logprobs."""
        return {
            "index": output.index,
            "text": self._echoes[output.index] + output.text,
            "logprobs": _text_logprobs(output.token_ids, output.logprobs, 0),
            "finish_reason": output.finish_reason,
        }

    def opening(self, answer: int) -> list[Json]:
        """The echoed prompt, if asked for."""
        text = self._echoes[answer]
        if not text:
            return []
        return [{"index": answer, "text": text, "logprobs": None, "finish_reason": None}]

    def piece(self, answer: int, delta: Delta) -> Json:
        """A piece of the text."""
        offset = self._text_lengths[answer]
        logprobs = _text_logprobs(delta.token_ids, delta.logprobs, offset)
        if logprobs is not None:
            self._text_lengths[answer] += sum(len(token) for token in logprobs["tokens"])
        return {
            "index": answer,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }


def _chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]] | None, top: int
) -> Json | None:
    if logprobs is None:
        return None
    tokens = [_chat_token(entry, chosen, top) for chosen, entry in zip(token_ids, logprobs)]
    return {"content": tokens, "refusal": None}


def _chat_token(entry: Mapping[int, Logprob], chosen: int, top: int) -> Json:
    likeliest = sorted(entry.values(), key=lambda item: item.rank)[:top]
    return {**_named(entry[chosen]), "top_logprobs": [_named(item) for item in likeliest]}


def _named(item: Logprob) -> Json:
    token = item.decoded_token
    return {"token": token, "logprob": _finite(item.logprob), "bytes": list(token.encode())}


def _finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is what vLLM says for a token that cannot come."""
    return max(logprob, -9999.0)


def _text_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]] | None, offset: int
) -> Json | None:
    if logprobs is None:
        return None
    chosen = [entry[token_id] for token_id, entry in zip(token_ids, logprobs)]
    offsets = []
    for item in chosen:
        offsets.append(offset)
        offset += len(item.decoded_token)
    return {
        "tokens": [item.decoded_token for item in chosen],
        "token_logprobs": [_finite(item.logprob) for item in chosen],
        "top_logprobs": [
            {item.decoded_token: _finite(item.logprob) for item in entry.values()}
            for entry in logprobs
        ],
        "text_offset": offsets,
    }
