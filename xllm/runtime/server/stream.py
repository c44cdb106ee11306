"""Server-sent events: deltas on their way to a client, and giving up when it has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from xllm.runtime.async_engine import Generation
from xllm.runtime.outputs import CompletionOutput, Delta, FinishReason
from xllm.runtime.server.errors import error_body
from xllm.runtime.server.replies import Json, Reply

DONE = "data: [DONE]\n\n"


class AnswerError(RuntimeError):
    """An answer ended with an error of ours."""


class ClientGone(Exception):
    """Nobody is there to read the answer."""


def _event(body: Json) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


async def events(generation: Generation, reply: Reply, include_usage: bool) -> AsyncIterator[str]:
    """The stream's events; every delta with text, logprobs or an end makes one."""
    opened: set[int] = set()
    tokens = 0
    async for pairs in generation:
        written = []
        for answer, delta in pairs:
            if delta.finish_reason is FinishReason.ERROR:
                yield "".join(written) + _failure(delta)
                return
            tokens += len(delta.token_ids)
            choices = [] if answer in opened else reply.opening(answer)
            opened.add(answer)
            if delta.text or delta.logprobs or delta.finish_reason is not None:
                choices.append(reply.piece(answer, delta))
            written += [_event(reply.chunk([choice])) for choice in choices]
        if written:
            yield "".join(written)
    if include_usage:
        yield _event(reply.usage_chunk(tokens))
    yield DONE


def _failure(delta: Delta) -> str:
    return f"data: {error_body(str(delta.error), 'server_error')}\n\n{DONE}"


class EventStream(StreamingResponse):
    """Streams a generation and closes it however the stream ends, even before it began."""

    def __init__(self, generation: Generation, reply: Reply, include_usage: bool) -> None:
        super().__init__(
            events(generation, reply, include_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def collect(generation: Generation, http: Request) -> list[CompletionOutput]:
    """Wait for all answers; raises AnswerError, or ClientGone if the client leaves first."""
    answers = asyncio.create_task(_gather(generation))
    gone = asyncio.create_task(_disconnect(http))
    try:
        await asyncio.wait((answers, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise ClientGone
        return answers.result()
    finally:
        answers.cancel()
        gone.cancel()
        generation.close()


async def _gather(generation: Generation) -> list[CompletionOutput]:
    outputs = [CompletionOutput(answer) for answer in range(generation.size)]
    async for pairs in generation:
        for answer, delta in pairs:
            outputs[answer].extend(delta)
            if delta.finish_reason is FinishReason.ERROR:
                raise AnswerError(str(delta.error))
    return outputs


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
