"""Relevance of a document to a query, by a causal language model that answers yes or no.

Template and score are those that Qwen3-Reranker was published with: the probability of ``yes``
against ``no`` as the next token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xllm.runtime.request import Prompt
from xllm.runtime.sampling_params import PoolingParams, RequestError

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n")
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Reranker:
    """Makes the prompts of query-document pairs, and scores of their logits."""

    tokenizer: PreTrainedTokenizerBase
    yes: int
    no: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Reranker:
        """Raises RequestError where ``yes`` or ``no`` is not one token."""
        answers = [tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "no")]
        if any(len(ids) != 1 for ids in answers):
            raise RequestError("the model cannot rerank: its tokenizer has no single tokens "
                               "'yes' and 'no'", "model")
        (yes,), (no,) = answers
        return cls(tokenizer, yes, no)

    def prompt(self, query: str, document: str, instruction: str | None = None) -> Prompt:
        """The published template; its parts are tokenised one by one, as there."""
        text = (f"<Instruct>: {INSTRUCTION if instruction is None else instruction}\n"
                f"<Query>: {query}\n<Document>: {document}")
        ids = [token for part in (_BEFORE, text, _AFTER)
               for token in self.tokenizer.encode(part, add_special_tokens=False)]
        return Prompt(ids, PoolingParams((self.yes, self.no)))

    @staticmethod
    def score(logits_2: Tensor) -> float:
        """Probability of ``yes``, 0 to 1, from the logits of ``yes`` and ``no``."""
        return float(logits_2.double().softmax(0)[0])
