"""Names and types that the runtime's fixtures and tests share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from fastapi.testclient import TestClient

from xllm.runtime.async_engine import AsyncEngine
from xllm.runtime.engine import Engine
from xllm.runtime.executor import Limits
from xllm.runtime.fake import Model

VOCAB_SIZE = 258  # a byte each, and ChatML's two marks
EOS_ID = 257
MakeLimits = Callable[..., Limits]
MakeEngine = Callable[..., Engine]
Reference = Callable[..., list[int]]
Recite = Callable[[str], Model]
MakeClient = Callable[[Engine], TestClient]
Listen = Callable[[AsyncEngine], AbstractContextManager[str]]
