"""Continuous batching: which requests run how many tokens in the next step.

Decode first, then prefill in chunks, oldest first, within the executor's limits. When pages run
short the youngest running request is preempted: its pages go back and its tokens are computed
again later. This cannot dead-lock: a request is admitted only if the pool could hold all of it,
the oldest running request is never preempted for another, and a step has a token for each
sequence it may hold. Every running request is older than every waiting one.
"""

from __future__ import annotations

from collections import OrderedDict

from xllm.runtime.batch import Chunk
from xllm.runtime.executor import Limits
from xllm.runtime.kv.blocks import BlockPool
from xllm.runtime.request import InvariantError, Request, State


class _Draft:
    """A plan in the making: tokens per request, and how many the step has left."""

    def __init__(self, budget: int) -> None:
        self.counts: dict[str, int] = {}
        self.budget = budget

    def take(self, request: Request) -> None:
        """Give ``request`` all the tokens it can use, as far as the step has them."""
        count = min(request.uncomputed, self.budget)
        self.counts[request.request_id] = count
        self.budget -= count

    def drop(self, request: Request) -> None:
        """Take back what ``request`` was given, if anything."""
        self.budget += self.counts.pop(request.request_id, 0)


class Scheduler:
    """Owns the queues and the pages; holds no tensors."""

    def __init__(self, limits: Limits) -> None:
        if not 1 <= limits.max_sequences <= limits.max_tokens:
            raise ValueError(
                f"max_tokens is {limits.max_tokens}, max_sequences is {limits.max_sequences}; "
                "accepted: at least one sequence, and a token for each"
            )
        self.limits = limits
        self.pool = BlockPool(limits.num_pages, limits.page_size)
        self.running: OrderedDict[str, Request] = OrderedDict()
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a new request behind all others."""
        self.waiting[request.request_id] = request

    def remove(self, request: Request) -> None:
        """Forget a request, whatever its state, and take its pages back."""
        queue = self.running if request.state is State.RUNNING else self.waiting
        del queue[request.request_id]
        self.pool.release(request.block_table)
        request.state = State.FINISHED

    def plan(self) -> list[Chunk]:
        """The next step's chunks, decodes first; their requests are advanced over them."""
        draft = _Draft(self.limits.max_tokens)
        preemptions = self.preemptions
        for request in sorted(self.running.values(), key=lambda request: request.uncomputed > 1):
            if self._make_room(request, draft):
                draft.take(request)
        if self.preemptions == preemptions:
            self._admit(draft)
        counts = draft.counts.items()
        return [self._chunk(self.running[name], count) for name, count in counts if count]

    def _make_room(self, request: Request, draft: _Draft) -> bool:
        """Get pages for what the step can run of ``request``; False if it was preempted."""
        while request.state is State.RUNNING:
            tokens = request.computed + min(request.uncomputed, draft.budget)
            if self.pool.grow(request.block_table, tokens):
                return True
            victim = next(reversed(self.running.values()))
            draft.drop(victim)
            self._preempt(victim)
        return False

    def _preempt(self, request: Request) -> None:
        del self.running[request.request_id]
        self.pool.release(request.block_table)
        request.start_over()
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)
        self.preemptions += 1

    def _admit(self, draft: _Draft) -> None:
        """Start waiting requests, in order, while tokens, sequences and pages last.

        A page per running request is left free, so that a newcomer is not preempted at once.
        """
        while self.waiting and draft.budget and len(self.running) < self.limits.max_sequences:
            request = next(iter(self.waiting.values()))
            missing = self.pool.pages_for(request.known)
            if missing + len(self.running) > self.pool.free_pages:
                return
            self.pool.grow(request.block_table, request.known)
            self.running[request.request_id] = self.waiting.pop(request.request_id)
            request.state = State.RUNNING
            draft.take(request)

    def _chunk(self, request: Request, count: int) -> Chunk:
        start = request.computed
        request.advance(count)
        return Chunk(request, start, count, samples=request.uncomputed == 0)

    def check_integrity(self) -> None:
        """Raise unless pages, states and lengths of all requests agree."""
        for queue, state in ((self.running, State.RUNNING), (self.waiting, State.WAITING)):
            for request in queue.values():
                request.check()
                if request.state is not state:
                    raise InvariantError(f"{request.request_id} is {request.state} among {state}")
        if any(request.block_table for request in self.waiting.values()):
            raise InvariantError("a waiting request holds pages")
        self.pool.check_integrity(request.block_table for request in self.running.values())
