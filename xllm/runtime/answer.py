"""What a step's rows add to one request: a token and its text, or the vector that it ends with."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Tokenizer
from torch import Tensor

from xllm.runtime.detokenize import Detokenizer
from xllm.runtime.outputs import Delta, FinishReason, Logprob
from xllm.runtime.request import Request
from xllm.runtime.sampler import Alternative, Sampled, Sampler, SamplingError, make_generator


class Answer:
    """The output side of a request; without a tokenizer it has token ids but no text."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, eos_token_ids: Collection[int]
    ) -> None:
        self.request = request
        self.generator = make_generator(request.params)
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(tokenizer, request.params.stop)

    def read(self, sampler: Sampler, hidden_RH: Tensor, row: int) -> Delta:
        """Draw a token from the row and append it; raises SamplingError."""
        return self.take(sampler.choose(row, self.request.params, self.generator))

    def take(self, sampled: Sampled) -> Delta:
        """Append a token; the delta's finish reason says whether it was the last."""
        self.request.append(sampled.token_id)
        text, finish, stop = "", self._token_stop(sampled.token_id), None
        if finish is FinishReason.STOP:
            is_eos = sampled.token_id in self._eos_token_ids
            stop = None if is_eos else sampled.token_id
        elif self._detokenizer is not None:
            text = self._detokenizer.push(sampled.token_id)
            if self._detokenizer.matched_stop is not None:
                finish, stop = FinishReason.STOP, self._detokenizer.matched_stop
        if finish is not None and self._detokenizer is not None:
            text += self._detokenizer.finish()
        return Delta(
            self.request.request_id, (sampled.token_id,), text,
            self._logprobs(sampled.alternatives), finish, stop,
        )

    def _token_stop(self, token_id: int) -> FinishReason | None:
        params = self.request.params
        if token_id in params.stop_token_ids:
            return FinishReason.STOP
        if token_id in self._eos_token_ids and not params.ignore_eos:
            return FinishReason.STOP
        if self.request.known == self.request.limit:
            return FinishReason.LENGTH
        return None

    def _logprobs(
        self, found: tuple[Alternative, ...] | None
    ) -> tuple[dict[int, Logprob], ...] | None:
        if found is None:
            return None
        return ({a.token_id: Logprob(a.logprob, a.rank, self._decode(a.token_id)) for a in found},)

    def _decode(self, token_id: int) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


class PooledAnswer:
    """The output side of a request of :class:`PoolingParams`: over with its first row."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def read(self, sampler: Sampler, hidden_RH: Tensor, row: int) -> Delta:
        """The vector that was asked for; raises SamplingError where it is not finite."""
        wanted = list(self.request.params.token_ids)
        vector = sampler.logits_RV[row, wanted] if wanted else hidden_RH[row].clone()
        if not bool(vector.isfinite().all()):
            raise SamplingError("the model's output is not finite")
        return Delta(self.request.request_id, finish_reason=FinishReason.STOP, vector=vector)
