"""The engine on a thread of its own, and its answers as asyncio iterators."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue

from xllm.runtime.engine import Engine, EngineDeadError
from xllm.runtime.outputs import Delta, FinishReason
from xllm.runtime.request import Prompt
from xllm.runtime.sampling_params import Params, RequestError

log = logging.getLogger(__name__)


class Generation:
    """The answers to one call's prompts: ``params.n`` to the first, then to the second, ...

    Iterate once for ``(answer, delta)`` pairs, in lists of all that have arrived, so that a slow
    reader catches up at once; ``close`` aborts what is not over, and must be called however the
    iteration ends.
    """

    def __init__(self, names: Sequence[str], abort: Callable[[Sequence[str]], None]) -> None:
        self.size = len(names)
        self._open = {name: answer for answer, name in enumerate(names)}
        self._abort = abort
        self._arrived: asyncio.Queue[Delta] = asyncio.Queue()

    def put(self, delta: Delta) -> None:
        """Hand over what a step added to one of the answers."""
        self._arrived.put_nowait(delta)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        while self._open:
            deltas = [await self._arrived.get()]
            while not self._arrived.empty():
                deltas.append(self._arrived.get_nowait())
            pairs = [(self._open[delta.request_id], delta) for delta in deltas]
            for delta in deltas:
                if delta.finish_reason is not None:
                    del self._open[delta.request_id]
            yield pairs

    def close(self) -> None:
        """Abort the answers that are not over."""
        names, self._open = list(self._open), {}
        if names:
            self._abort(names)


class AsyncEngine:
    """Runs ``engine`` on a thread; every method is for the event loop that called ``start``.

    The two sides meet in a queue of calls to be made on the engine's thread and in
    ``call_soon_threadsafe`` the other way.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._generations: dict[str, Generation] = {}
        self._numbers = count()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._deadline: float | None = None

    @property
    def healthy(self) -> bool:
        """Whether requests are taken and steps are run."""
        running = self._thread is not None and self._thread.is_alive()
        return running and self.engine.healthy and not self._closing

    @property
    def open_answers(self) -> int:
        """Answers not over yet, queued ones included."""
        return len(self._generations)

    async def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="xllm-engine", daemon=True)
        self._thread.start()

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let open ones finish for a while, end the rest and the thread."""
        self._closing = True
        if self._thread is not None:
            self._calls.put(partial(self._begin_stop, time.monotonic() + drain_seconds))
            await asyncio.to_thread(self._thread.join)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise RequestError or EngineDeadError unless all of these could be served."""
        if self._closing or self._thread is None:
            raise EngineDeadError("the engine is not running")
        for prompt in prompts:
            self.engine.check(prompt.token_ids, prompt.params)

    def submit(self, prompts: Sequence[Prompt]) -> Generation:
        """Queue all prompts or, raising what ``check`` does, none."""
        self.check(prompts)
        wanted = [
            (f"answer-{next(self._numbers)}", prompt, choice)
            for prompt in prompts
            for choice in range(prompt.params.n)
        ]
        generation = Generation([name for name, _, _ in wanted], self._abort)
        for name, prompt, choice in wanted:
            self._generations[name] = generation
            params = prompt.params.for_choice(choice)
            self._calls.put(partial(self._submit, name, prompt, params))
        return generation

    def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            self._generations.pop(name, None)
            self._calls.put(partial(self.engine.abort, name))

    def _dispatch(self, deltas: Sequence[Delta]) -> None:
        """On the event loop: hand deltas to whoever still waits for them."""
        for delta in deltas:
            if delta.request_id not in self._generations:
                continue  # aborted
            self._generations[delta.request_id].put(delta)
            if delta.finish_reason is not None:
                del self._generations[delta.request_id]

    def _end_all(self) -> None:
        """On the event loop, once the thread is over: nobody waits for what will not come."""
        self._closing = True
        reason = str(self.engine.failure)
        self._dispatch([Delta(name, finish_reason=FinishReason.ERROR, error=reason)
                        for name in self._generations])

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        try:
            while self._deadline is None or self._draining(self._deadline):
                self._make_calls()
                if self.engine.has_work():
                    self._publish(self.engine.step())
        except Exception as error:
            log.exception("the engine's thread failed")
            self.engine.fail(error)
        finally:
            self.engine.fail(EngineDeadError("the engine was stopped"))
            self._call_back(self._end_all)

    def _draining(self, deadline: float) -> bool:
        return self.engine.has_work() and time.monotonic() < deadline

    def _make_calls(self) -> None:
        """Make every call that is queued; wait for one only if there is nothing else to do."""
        if not self.engine.has_work() and self._deadline is None:
            self._calls.get()()
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                return
            call()

    def _begin_stop(self, deadline: float) -> None:
        self._deadline = deadline

    def _submit(self, name: str, prompt: Prompt, params: Params) -> None:
        try:
            self.engine.submit(name, prompt.token_ids, params, prompt.images)
        except (RequestError, EngineDeadError) as error:
            delta = Delta(name, finish_reason=FinishReason.ERROR, error=str(error))
            self._publish([delta])

    def _publish(self, deltas: Sequence[Delta]) -> None:
        if deltas:
            self._call_back(partial(self._dispatch, deltas))

    def _call_back(self, call: Callable[[], None]) -> None:
        """Have ``call`` made on the event loop, unless that has ended without a ``stop``."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)
