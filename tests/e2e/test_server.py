"""``xllm run`` as its users meet it: a process, a port, the OpenAI client, right answers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import openai
import pytest

BANNER_SECONDS = 400  # a first start compiles


def start(*flags: str) -> tuple[subprocess.Popen, str, list[str]]:
    """A server process, its URL, and the lines it printed so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xllm.cli", "run", "demo", "--port", "0", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    watchdog = threading.Timer(BANNER_SECONDS, process.kill)
    watchdog.start()
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if " -d " in line:
            break
    watchdog.cancel()
    found = re.search(r"ready on (http://\S+)", "".join(lines))
    assert found, "".join(lines)
    return process, found.group(1), lines


def stop(process: subprocess.Popen) -> int:
    """SIGTERM; the exit code."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(30)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """One compiled demo server for the module; it must end cleanly."""
    process, url, lines = start()
    yield url, lines
    assert stop(process) == 0


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def ask(url: str, question: str) -> str:
    """The greedy answer to one question."""
    answer = client(url).chat.completions.create(
        model="demo", messages=[{"role": "user", "content": question}], temperature=0,
        max_tokens=64)
    return answer.choices[0].message.content


def test_banner_has_all_a_user_needs(server: tuple[str, list[str]]) -> None:
    text = "".join(server[1])
    for needed in ("context length", "KV cache", "blocks", "curl", "/v1/chat/completions"):
        assert needed in text


def test_the_readme_question(server: tuple[str, list[str]]) -> None:
    assert ask(server[0], "What is 17+25?").endswith("42")


def test_sums_are_right(server: tuple[str, list[str]]) -> None:
    """Every two-digit sum below was checked to be right with ``transformers``."""
    for a, b in [(17, 25), (48, 31), (66, 27), (90, 9), (55, 55), (38, 47)]:
        assert ask(server[0], f"What is {a}+{b}?").endswith(str(a + b))


def test_stream_equals_no_stream(server: tuple[str, list[str]]) -> None:
    messages = [{"role": "user", "content": "Count from 3 to 9."}]
    chunks = client(server[0]).chat.completions.create(
        model="demo", messages=messages, temperature=0, max_tokens=64, stream=True)
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == ask(server[0], "Count from 3 to 9.") == "3, 4, 5, 6, 7, 8, 9"


def test_prompts_longer_than_a_step(server: tuple[str, list[str]]) -> None:
    """A chat of more tokens than one step takes is prefilled in chunks, and answered."""
    turns = []
    for _ in range(24):
        turns += [{"role": "user", "content": "What is 52-17?"},
                  {"role": "assistant", "content": "12-7=5, 5-1-1=3, 52-17=35"}]
    turns.append({"role": "user", "content": "What is 17+25?"})
    answer = client(server[0]).chat.completions.create(
        model="demo", messages=turns, temperature=0, max_tokens=64)
    assert answer.usage.prompt_tokens > 512
    assert answer.choices[0].message.content


def test_models_and_health(server: tuple[str, list[str]]) -> None:
    assert [m.id for m in client(server[0]).models.list()] == ["demo"]


def test_port_in_use_is_one_line(server: tuple[str, list[str]]) -> None:
    port = server[0].rsplit(":", 1)[1]
    done = subprocess.run([sys.executable, "-m", "xllm.cli", "run", "demo", "--port", port],
                          capture_output=True, text=True)
    assert done.returncode != 0 and f"port {port}" in done.stderr
    assert "Traceback" not in done.stderr
