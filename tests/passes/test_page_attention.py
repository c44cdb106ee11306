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
from xllm.graph import Input, State, Weight, placeholders
from xllm.passes.page_attention import page_attention
from xllm.weights import Leaf, Reshape, Slice, Transpose

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


# --- latent attention: 3 heads of N 8, r 4, V 6 over a latent of R 16 -----------------------------

LATENT_PAGED = [aten.squeeze.dim] * 4 + [
    xllm.latent_write.default, xllm.paged_latent_attention.default, aten.unsqueeze.default]
LATENT_SHAPES = {"q_nope": (1, T, 3, 8), "q_rope": (1, T, 3, 4), "latent": (1, T, 16),
                 "k_rope": (1, T, 4), "weight": (3 * 14, 16)}


def latent_graph(function: object, dtype: torch.dtype = torch.float32) -> torch.fx.GraphModule:
    fakes = {name: fake(shape, dtype) for name, shape in LATENT_SHAPES.items()}
    return build(function, fakes, ("weight",))


def attend_latent(q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor,
                  weight: Tensor) -> Tensor:
    return xllm.latent_attention.default(q_nope, q_rope, latent, k_rope, weight, 0.3)


def test_latent_hit() -> None:
    """The cache holds R + r values a token; the weight becomes two matrices by recipe."""
    gm = latent_graph(attend_latent)
    assert page_attention(gm, context()) == 1
    assert targets(clean(gm)) == LATENT_PAGED
    (cache,) = placeholders(gm, State)
    assert cache.meta["val"].shape == (P, 4, 20)
    paged = next(n for n in gm.graph.nodes if n.target is xllm.paged_latent_attention.default)
    w_uk, w_uv, scale = paged.args[-3:]
    both = Reshape(Leaf("weight.weight"), (3, 14, 16))
    assert w_uk.meta["bind"] == Weight(Slice(both, 1, 0, 8)) and scale == 0.3
    assert w_uv.meta["bind"] == Weight(Transpose(Slice(both, 1, 8, 14), 1, 2))
    assert w_uk.meta["val"].shape == (3, 8, 16) and w_uv.meta["val"].shape == (3, 16, 6)


def test_latent_second_users() -> None:
    """Others may read the latent, the weight and the result."""
    def used(q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor,
             weight: Tensor) -> tuple[Tensor, ...]:
        out = attend_latent(q_nope, q_rope, latent, k_rope, weight)
        return out, aten.exp.default(out), aten.exp.default(latent), aten.exp.default(weight)

    gm = latent_graph(used)
    assert page_attention(gm, context()) == 1
    assert xllm.latent_attention.default not in targets(clean(gm))


def test_latent_chain_beside_plain_attention() -> None:
    """A cache each, and one set of batch inputs."""
    def both(q: Tensor, k: Tensor, v: Tensor, **latent: Tensor) -> tuple[Tensor, ...]:
        return attend(q, k, v), attend_latent(**latent), attend_latent(**latent)

    fakes = {name: fake(shape) for name, shape in LATENT_SHAPES.items()}
    gm = build(both, ARGUMENTS | fakes, ("weight",))
    assert page_attention(gm, context()) == 3
    ranks = [n.meta["val"].dim() for n in placeholders(clean(gm), State)]
    assert sorted(ranks) == [3, 3, 5] and len(placeholders(gm, Input)) == 4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_latent_values(seed: int, dtype: torch.dtype) -> None:
    batch = draw_batch(random.Random(seed), 4, single=True)
    generator = torch.Generator().manual_seed(seed)
    tokens = len(batch["positions"])
    values = {name: torch.randn([tokens if d == T else d for d in shape], generator=generator)
              .div(4 if name == "weight" else 1).to(dtype) for name, shape in LATENT_SHAPES.items()}
    values["kv_cache"] = torch.full((int(batch["num_pages"]), 4, 20), 9.0, dtype=dtype)
    gm = latent_graph(attend_latent, dtype)
    (want,) = execute_bound(gm, values)
    page_attention(gm, context(dtype))
    (got,) = execute_bound(clean(gm), values | batch)
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]  # keys and values are not rounded
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)
