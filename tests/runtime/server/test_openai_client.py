"""The real `openai` client over a real socket, and what happens when a client leaves."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable

import openai
import pytest

from tests.runtime.runtime_types import EOS_ID, Listen, MakeEngine
from xllm.runtime.async_engine import AsyncEngine
from xllm.runtime.batch import Batch
from xllm.runtime.engine import Engine
from xllm.runtime.fake import FakeExecutor, FakeLaunched

HELLO = [{"role": "user", "content": "Hello"}]


def connect(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in 30 s"
        time.sleep(0.005)


def test_openai_client(listen: Listen, make_engine: MakeEngine) -> None:
    with listen(AsyncEngine(make_engine())) as url, connect(url) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        settings = {"model": "fake", "messages": HELLO, "seed": 3, "max_tokens": 40, "n": 2,
                    "logprobs": True, "top_logprobs": 1}
        whole = client.chat.completions.create(**settings)
        chunks = list(client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage == whole.usage and whole.usage is not None
        assert whole.usage.prompt_tokens == 24
        tokens = sum(len(choice.logprobs.content) for choice in whole.choices if choice.logprobs)
        assert whole.usage.completion_tokens == tokens
        for choice in whole.choices:
            parts = [part for chunk in chunks for part in chunk.choices
                     if part.index == choice.index]
            assert "".join(part.delta.content or "" for part in parts) == choice.message.content
            assert parts[-1].finish_reason == choice.finish_reason
        text = client.completions.create(model="fake", prompt="ab", seed=1, max_tokens=9)
        parts = list(client.completions.create(
            model="fake", prompt="ab", seed=1, max_tokens=9, stream=True))
        assert "".join(part.choices[0].text for part in parts) == text.choices[0].text


def test_openai_client_sees_errors(listen: Listen, make_engine: MakeEngine) -> None:
    with listen(AsyncEngine(make_engine())) as url, connect(url) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt", messages=HELLO)
        assert missing.value.code == "model_not_found"


class Gated(FakeExecutor):
    """Runs two steps, and the others when the gate is open."""

    def __init__(self, like: Engine) -> None:
        super().__init__(like.limits)
        self.entered, self.gate = threading.Event(), threading.Event()

    def launch(self, batch: Batch) -> FakeLaunched:
        if len(self.batches) >= 2:
            self.entered.set()
            assert self.gate.wait(30)
        return super().launch(batch)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_pages(listen: Listen, make_engine: MakeEngine, stream: bool) -> None:
    executor = Gated(make_engine())
    engine = Engine(executor, {EOS_ID})
    served, pool = AsyncEngine(engine), engine.scheduler.pool
    body = json.dumps({"prompt": [97] * 50, "n": 3, "max_tokens": 150, "ignore_eos": True,
                       "stream": stream})
    head = ("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
    with listen(served) as url:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
            client.sendall((head + body).encode())
            assert executor.entered.wait(30)
        until(lambda: served.open_answers == 0)
        assert pool.free_pages < pool.usable_pages
        executor.gate.set()
        until(lambda: pool.free_pages == pool.usable_pages)
        assert len(executor.batches) < 10  # not the 150 that the answers would have taken
