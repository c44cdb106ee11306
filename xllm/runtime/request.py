"""A request as the scheduler sees it: its tokens, and how many of them the KV cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor

from xllm.runtime.sampling_params import Params


class InvariantError(RuntimeError):
    """The runtime's own bookkeeping is wrong: a bug here, not in the request."""


class State(Enum):
    """Where a request is; preemption takes it from RUNNING back to WAITING."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, eq=False)
class Image:
    """An image as its processor made it; its embeddings stand for ``count`` tokens from ``start``.

    ``pixel_values`` is float32 ``[patches, values]``, ``grid`` counts patches in time, height and
    width. Equal ``digest`` means equal embeddings.
    """

    pixel_values: Tensor
    grid: tuple[int, int, int]
    start: int
    count: int
    digest: bytes


@dataclass(frozen=True, eq=False)
class Images:
    """A prompt's images in its order, and the rotary positions (time, height, width) they cause.

    A token behind the prompt is ``delta`` further on than its index says.
    """

    items: tuple[Image, ...]
    positions: Sequence[tuple[int, int, int]]
    delta: int

    def position(self, index: int) -> tuple[int, int, int]:
        """Rotary positions of a token of the prompt or of the answer."""
        if index < len(self.positions):
            return self.positions[index]
        return (index + self.delta,) * 3


@dataclass(frozen=True)
class Prompt:
    """What to answer and how; ``text`` is only carried through to the output."""

    token_ids: Sequence[int]
    params: Params
    text: str | None = None
    images: Images | None = None


class Request:
    """One sequence: ``0 <= cached <= computed <= known <= limit`` holds at every change.

    ``cached`` tokens were found in the KV cache at admission (none yet: there is no prefix
    cache), ``computed`` tokens have their keys and values written by a step planned so far,
    ``known`` tokens have ids, ``limit`` is where the answer ends at the latest. ``block_table``
    lists the KV pages held, in token order.
    """

    def __init__(
        self, request_id: str, prompt_token_ids: Sequence[int], params: Params, limit: int,
        images: Images | None = None,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.images = images
        self.token_ids = list(prompt_token_ids)
        self.prompt_length = len(self.token_ids)
        self.limit = limit
        self.state = State.WAITING
        self.cached = 0
        self.computed = 0
        self.block_table: list[int] = []
        self.check()

    @property
    def known(self) -> int:
        """Tokens whose ids are known: the prompt and the answer so far."""
        return len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The answer so far."""
        return self.token_ids[self.prompt_length :]

    @property
    def uncomputed(self) -> int:
        """Tokens still to be run: 1 in decode, more in prefill."""
        return self.known - self.computed

    def advance(self, count: int) -> None:
        """Count ``count`` more tokens as computed."""
        self.computed += count
        self.check()

    def append(self, token_id: int) -> None:
        """Add one token to the answer."""
        self.token_ids.append(token_id)
        self.check()

    def start_over(self) -> None:
        """Forget what the KV cache held; the tokens stay known and are computed again."""
        self.cached = self.computed = 0
        self.state = State.WAITING
        self.check()

    def check(self) -> None:
        """Raise :class:`InvariantError` unless the lengths are in order."""
        if not 0 <= self.cached <= self.computed <= self.known <= self.limit:
            raise InvariantError(
                f"request {self.request_id}: lengths out of order: cached {self.cached}, "
                f"computed {self.computed}, known {self.known}, limit {self.limit}"
            )
