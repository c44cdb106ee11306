"""What a request asks for: tokens and how they are chosen, or no token: vLLM's names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from xllm.errors import UserError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
SEED_RANGE = 1 << 63
GREEDY_BELOW = 1e-5


class RequestError(UserError, ValueError):
    """A request that cannot be served; ``param`` names what to change about it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def _refuse(name: str, value: object, accepted: str) -> None:
    raise RequestError(f"{name} is {value!r}; accepted: {accepted}", name)


def _real(name: str, value: object, low: float, high: float, accepted: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):
        _refuse(name, value, accepted)


def _integer(name: str, value: object, low: int, high: int, accepted: str) -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
        _refuse(name, value, accepted)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request.

    ``temperature`` 0 is greedy. ``top_k`` of None, 0 or -1 keeps the whole vocabulary.
    ``max_tokens`` of None runs to the end of the context. ``seed`` makes a request's draws its
    own, whatever else is in the batch. ``stop`` strings end the text before them; the tokens that
    spelled them stay in ``token_ids``. ``logprobs`` of k reports, for each token, the k likeliest
    and the chosen one. Raises :class:`RequestError`.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    max_tokens: int | None = 16
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._normalise()
        _integer("n", self.n, 1, MAX_CHOICES, f"1 to {MAX_CHOICES}")
        _real("temperature", self.temperature, 0, math.inf, "0 or more, finite")
        _real("top_p", self.top_p, math.ulp(0.0), 1, "more than 0, up to 1")
        _real("min_p", self.min_p, 0, 1, "0 to 1")
        if self.top_k is not None:
            _integer("top_k", self.top_k, 1, 1 << 31, "1 or more; None, 0 or -1 for all")
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 1 << 31, "1 or more")
        if self.seed is not None:
            _integer("seed", self.seed, -SEED_RANGE, SEED_RANGE - 1, "a 64-bit signed integer")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        self._check_stops()

    def _normalise(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.top_k in (0, -1):
            object.__setattr__(self, "top_k", None)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOPS:
            _refuse("stop", f"{len(self.stop)} strings", f"at most {MAX_STOPS}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                _refuse("stop", text, "a non-empty string, or a list of them")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 1 << 31, "a list of token ids")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken; as in vLLM, nearly 0 counts as 0."""
        return self.temperature < GREEDY_BELOW

    def for_choice(self, index: int) -> SamplingParams:
        """Params of the ``index``-th of ``n`` answers: one answer, with a seed of its own."""
        if self.n == 1:
            return self
        seed = self.seed
        if seed is not None:
            seed = (seed + index + SEED_RANGE) % (2 * SEED_RANGE) - SEED_RANGE
        return dataclasses.replace(self, n=1, seed=seed)


@dataclass(frozen=True)
class PoolingParams:
    """A prompt that is read and not answered.

    It ends with a vector, float32: the hidden state of its last token after the final norm, or the
    next token's logits of ``token_ids``, where these are given.
    """

    token_ids: tuple[int, ...] = ()

    n: ClassVar[int] = 1
    max_tokens: ClassVar[int] = 0
    stop: ClassVar[tuple[str, ...]] = ()

    def for_choice(self, index: int) -> PoolingParams:
        """The only one there is."""
        return self


Params = SamplingParams | PoolingParams
