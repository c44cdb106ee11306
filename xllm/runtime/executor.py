"""What the engine needs of whatever runs the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from xllm.runtime.batch import Batch


@dataclass(frozen=True)
class Limits:
    """What one executor can take; the scheduler stays inside it.

    ``num_pages`` counts page 0, which is scratch for padding and is never given to a sequence.
    ``context_length`` bounds prompt plus answer of one request.
    """

    max_tokens: int
    max_sequences: int
    context_length: int
    page_size: int
    num_pages: int
    vocab_size: int


class Launched(Protocol):
    """A step under way."""

    def logits(self) -> Tensor:
        """Wait for the step; float32 ``[R, V]``, valid until the next launch."""
        ...


class Executor(Protocol):
    """Runs batches one at a time; keeps the KV cache."""

    limits: Limits

    def launch(self, batch: Batch) -> Launched:
        """Start one step. The batch is within :attr:`limits`."""
        ...
