"""Incremental detokenisation: whole characters only, and nothing that may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopMatcher:
    """Finds stop strings in text that arrives in pieces; the result does not depend on the cuts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text; return what is now certain to come before any stop string."""
        self._held += text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if found:  # the one that was complete first
            _, start, self.matched = min(found)
            certain, self._held = self._held[:start], ""
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def flush(self) -> str:
        """Return what was held back, no more text being to come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class Detokenizer:
    """Turns one answer's token ids into text; special tokens have none."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._matcher = StopMatcher(stops)
        self._undecoded: list[int] = []

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, once one has."""
        return self._matcher.matched

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain now."""
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            self._undecoded.append(token_id)
            return ""
        self._undecoded.clear()
        return self._matcher.push(text)

    def finish(self) -> str:
        """Return the rest; a character that was never completed shows as U+FFFD."""
        if self.matched_stop is not None:
            return ""
        rest = self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        return self._matcher.push(rest) + self._matcher.flush()
