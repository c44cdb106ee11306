"""Whatever is submitted, aborted and preempted when: the tokens are those of one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.runtime.runtime_types import Reference
from xllm.runtime.engine import Engine
from xllm.runtime.executor import Limits
from xllm.runtime.fake import HIDDEN, FakeExecutor, hashed_model
from xllm.runtime.outputs import CompletionOutput, FinishReason
from xllm.runtime.sampling_params import Params, PoolingParams, SamplingParams

VOCAB, EOS = 13, 12
MODEL = hashed_model(VOCAB)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 99),
    max_tokens=st.none() | st.integers(1, 12),
    stop_token_ids=st.lists(st.integers(0, EOS), max_size=1),
    ignore_eos=st.booleans(),
)
POOLING = st.builds(PoolingParams, st.sampled_from([(), (3, 1)]))


class EngineMachine(RuleBasedStateMachine):
    """Random limits with few pages, so that preemption is common."""

    requests = Bundle("requests")
    reference: Reference

    @initialize(max_sequences=st.integers(1, 5), spare_tokens=st.integers(0, 12),
                page_size=st.sampled_from([1, 2, 4]), pages=st.integers(8, 16))
    def build(self, max_sequences: int, spare_tokens: int, page_size: int, pages: int) -> None:
        limits = Limits(max_sequences + spare_tokens, max_sequences, 40, page_size, pages, VOCAB)
        self.engine = Engine(FakeExecutor(limits, MODEL), {EOS})
        self.prompts: dict[str, tuple[list[int], Params]] = {}
        self.outputs: dict[str, CompletionOutput] = {}

    @rule(target=requests, length=st.integers(1, 30), start=st.integers(0, VOCAB - 1),
          params=PARAMS | POOLING)
    def submit(self, length: int, start: int, params: Params) -> str:
        name = f"r{len(self.prompts)}"
        length = min(length, self.engine.context_length - (params.max_tokens != 0))
        prompt = [(start + i * i) % VOCAB for i in range(length)]
        self.engine.submit(name, prompt, params)
        self.prompts[name] = prompt, params
        self.outputs[name] = CompletionOutput(0)
        return name

    @rule(name=consumes(requests))
    def abort(self, name: str) -> None:
        self.engine.abort(name)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for delta in self.engine.step():
                assert self.outputs[delta.request_id].finish_reason is None
                self.outputs[delta.request_id].extend(delta)
            self.engine.check_integrity()
            assert self.engine.failure is None, self.engine.failure

    @invariant()
    def books_are_right(self) -> None:
        self.engine.check_integrity()

    def teardown(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work():
                break
            self.step(1)
        assert not self.engine.has_work(), "dead-locked"
        pool = self.engine.scheduler.pool
        assert pool.free_pages == pool.usable_pages
        for name, output in self.outputs.items():
            self.compare(name, output)

    def compare(self, name: str, output: CompletionOutput) -> None:
        prompt, params = self.prompts[name]
        if isinstance(params, PoolingParams):
            self.compare_vector(prompt, params, output)
            return
        context = self.engine.context_length
        expected = type(self).reference(MODEL, prompt, params, {EOS}, context)
        if output.finish_reason == FinishReason.ABORT:
            assert output.token_ids == expected[: len(output.token_ids)]
        else:
            assert output.token_ids == expected

    def compare_vector(
        self, prompt: list[int], params: PoolingParams, output: CompletionOutput
    ) -> None:
        assert output.token_ids == []
        if output.finish_reason == FinishReason.STOP:
            wanted = list(params.token_ids) or list(range(HIDDEN))
            assert torch.equal(output.vector, MODEL(prompt)[wanted])
        else:
            assert output.finish_reason == FinishReason.ABORT and output.vector is None


def run(reference: Reference, examples: int) -> None:
    machine = type("Machine", (EngineMachine,), {"reference": staticmethod(reference)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=25, deadline=None))


def test_any_schedule_gives_the_reference_tokens(reference: Reference) -> None:
    run(reference, 50)


@pytest.mark.slow
def test_any_schedule_gives_the_reference_tokens_a_thousand_times(reference: Reference) -> None:
    run(reference, 1000)
