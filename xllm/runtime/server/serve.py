"""Listen, tell the user when requests are taken, and leave cleanly."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from transformers import PreTrainedTokenizerFast

from xllm.config import ServerConfig
from xllm.runtime.async_engine import AsyncEngine
from xllm.runtime.embedding import Embedder
from xllm.runtime.engine import Engine
from xllm.runtime.server.app import create_app
from xllm.runtime.server.images import Vision

DRAIN_SECONDS = 10
BACKLOG = 2048


class _Server(uvicorn.Server):
    """Prints the banner once the socket listens."""

    def __init__(self, config: uvicorn.Config, banner: str) -> None:
        super().__init__(config)
        self._banner = banner

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        print(self._banner, flush=True)


def serve(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, model_name: str, config: ServerConfig,
    embedder: Embedder = Embedder(), vision: Vision | None = None,
) -> int:
    """Serve until SIGTERM or ctrl-C; return the exit code, 1 if the port cannot be had."""
    try:
        listener = _listen(config.host, config.port)
    except OSError as error:
        print(f"error: cannot listen on {config.host} port {config.port}: {error.strerror}; "
              "--port 0 takes a free one", file=sys.stderr)
        return 1
    port: int = listener.getsockname()[1]
    app = create_app(AsyncEngine(engine), tokenizer, model_name, embedder, vision)
    options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=DRAIN_SECONDS)
    server = _Server(options, banner(engine, model_name, config.host, port))
    with listener, _quiet_signals():
        server.run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """Swallow the signals that uvicorn raises again after it has shut down because of them."""

    def ignore(_: int, __: FrameType | None) -> None:
        return None

    before = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def banner(engine: Engine, model_name: str, host: str, port: int) -> str:
    """What the user sees when the server is ready."""
    limits = engine.limits
    shown_host = f"[{host}]" if ":" in host else host
    url = f"http://{shown_host}:{port}"
    turn = {"role": "user", "content": "What is 17+25?"}
    question = {"model": model_name, "messages": [turn], "temperature": 0}
    pages = engine.scheduler.pool.usable_pages
    return "\n".join((
        f"xLLM is ready on {url}",
        f"  model           {model_name}",
        f"  context length  {engine.context_length} tokens",
        f"  KV cache        {pages} blocks of {limits.page_size} tokens, {engine.kv_tokens} in all",
        "Ask it:",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"    -d {shlex.quote(json.dumps(question))}",
    ))
