"""page_attention: attention over one sequence becomes a KV write and paged attention."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.pass_graphs import (
    P,
    T,
    aten,
    build,
    clean,
    context,
    execute_bound,
    fake,
    targets,
    xllm,
)
from xllm.compiler.verify import draw_batch
from xllm.graph import Input, State, placeholders
from xllm.passes.page_attention import page_attention

PAGED = [aten.squeeze.dim] * 3 + [xllm.kv_write.default, xllm.paged_attention.default,
                                  aten.unsqueeze.default]
SHAPES = {"q": (1, T, 4, 8), "k": (1, T, 2, 8), "v": (1, T, 2, 8)}
ARGUMENTS = {name: fake(shape) for name, shape in SHAPES.items()}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return xllm.attention.default(q, k, v, 0.3, 5, 20.0)


def test_hit() -> None:
    gm = build(attend, ARGUMENTS)
    assert page_attention(gm, context()) == 1
    assert targets(clean(gm)) == PAGED
    (cache,) = placeholders(gm, State)
    assert cache.meta["val"].shape == (P, 2, 2, 4, 8)
    assert {n.meta["bind"].name for n in placeholders(gm, Input)} == {
        "slot_mapping", "block_table", "query_start_loc", "seq_lens"}
    paged = next(n for n in gm.graph.nodes if n.target is xllm.paged_attention.default)
    assert paged.args[-4:] == (0.3, 5, 20.0, None)


def test_miss() -> None:
    gm = build(lambda q, k, v: aten.add.Tensor(k, v), ARGUMENTS)
    assert page_attention(gm, context()) == 0
    assert not placeholders(gm, State) and not placeholders(gm, Input)


def test_second_users_of_keys_and_result() -> None:
    def used(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        k = aten.neg.default(k)
        out = attend(q, k, v)
        return out, aten.exp.default(out), aten.exp.default(k)

    gm = build(used, ARGUMENTS)
    assert page_attention(gm, context()) == 1
    assert xllm.attention.default not in targets(clean(gm))


def test_chain_has_a_cache_per_layer() -> None:
    gm = build(lambda q, k, v: attend(attend(q, k, v), k, v), ARGUMENTS)
    assert page_attention(gm, context()) == 2
    caches = placeholders(clean(gm), State)
    writes = [n.args[2] for n in gm.graph.nodes if n.target is xllm.kv_write.default]
    assert writes == caches[::-1] or writes == caches
    assert len(placeholders(gm, Input)) == 4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.sampled_from([None, 1, 3]),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_values(seed: int, window: int | None, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    batch = draw_batch(rng, 4, single=True)
    generator = torch.Generator().manual_seed(seed)
    tokens = len(batch["positions"])
    values = {name: torch.randn([tokens if d == T else d for d in shape], generator=generator)
              .to(dtype) for name, shape in SHAPES.items()}
    values["kv_cache"] = torch.full((int(batch["num_pages"]), 2, 2, 4, 8), 9.0, dtype=dtype)
    gm = build(lambda q, k, v: xllm.attention.default(q, k, v, 0.3, window),
               {name: fake(shape, dtype) for name, shape in SHAPES.items()})
    (want,) = execute_bound(gm, values)
    page_attention(gm, context(dtype))
    (got,) = execute_bound(clean(gm), values | batch)
    torch.testing.assert_close(got, want)
