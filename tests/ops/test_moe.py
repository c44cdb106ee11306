"""Routing is that of transformers; grouped experts are the experts."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from xllm.ops import REGISTRY
from xllm.ops.group_matmul import (
    combine_experts,
    gated_activation,
    group_matmul,
    group_tokens,
    packed_group_matmul,
)
from xllm.ops.linear import pack
from xllm.ops.moe import experts
from xllm.ops.moe_route import moe_route

BF16 = torch.bfloat16
SEEDS = st.integers(0, 2**32)
SIZES = {"hidden_size": 16, "num_experts_per_tok": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "n_routed_experts": 16, "n_group": 4, "topk_group": 2,
           "routed_scaling_factor": 2.5}
ROUTERS = {
    "qwen": (Qwen3MoeTopKRouter, Qwen3MoeConfig(num_experts=16, norm_topk_prob=False, **SIZES),
             (None, 2, "softmax", [1, 1], False, 0.0, 1.0, BF16)),
    "qwen normalised": (
        Qwen3MoeTopKRouter, Qwen3MoeConfig(num_experts=16, norm_topk_prob=True, **SIZES),
        (None, 2, "softmax", [1, 1], True, 0.0, 1.0, BF16)),
    "mixtral": (MixtralTopKRouter, MixtralConfig(num_local_experts=16, **SIZES),
                (None, 2, "softmax", [1, 1], True)),
    "deepseek v2": (
        DeepseekV2TopkRouter, DeepseekV2Config(topk_method="group_limited_greedy", **GROUPED),
        (None, 2, "softmax", [4, 2], False, 0.0, 2.5)),
    "deepseek v2 greedy": (DeepseekV2TopkRouter, DeepseekV2Config(topk_method="greedy", **GROUPED),
                           (None, 2, "softmax", [1, 1], False, 0.0, 2.5)),
    "deepseek v3": (DeepseekV3TopkRouter, DeepseekV3Config(norm_topk_prob=True, **GROUPED),
                    ("bias", 2, "sigmoid", [4, 2], True, 1e-20, 2.5)),
    "gpt-oss": (GptOssTopKRouter, GptOssConfig(num_local_experts=16, **SIZES),
                (None, 2, "softmax_after_top_k")),
}


def by_id(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the experts of each row in ascending order."""
    order = ids.argsort(-1)
    return weights.gather(1, order), ids.gather(1, order)


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_route_is_that_of_transformers(name: str, seed: int) -> None:
    kind, config, options = ROUTERS[name]
    generator = torch.Generator().manual_seed(seed)
    router: nn.Module = kind(config).to(BF16)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        logits, weights, ids = router(torch.randn(9, 16, generator=generator).to(BF16))
        bias, *rest = options
        if bias:
            bias = router.e_score_correction_bias
        elif name == "mixtral":
            logits = logits.float()
        got = moe_route(logits, bias, *rest)
    for ours, theirs in zip(by_id(*got), by_id(weights, ids), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def grouped_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
                    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str,
                    limit: float | None, interleaved: bool, transposed: bool) -> Tensor:
    """The block as ``group_experts`` rewrites it, weights brought into one layout."""
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if interleaved:
        gate_up = torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), 1)
        if gate_up_bias is not None:
            gate_up_bias = torch.cat((gate_up_bias[:, ::2], gate_up_bias[:, 1::2]), 1)
    rows, places, offsets = group_tokens(ids, gate_up.shape[0])
    both = packed_group_matmul(x, pack(gate_up), gate_up_bias, offsets, rows, gate_up.shape[1])
    hidden = gated_activation(both, activation, limit)
    return combine_experts(group_matmul(hidden, down, down_bias, offsets, None), places, weights)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_grouped_experts_are_the_experts(dtype: torch.dtype, seed: int) -> None:
    """All layouts, biases, activations and limits that the op's samples have."""
    arguments = REGISTRY["experts"].sample(random.Random(seed), dtype)
    got, want = grouped_experts(*arguments), experts(*arguments)
    assert got.dtype == want.dtype
    bound = REGISTRY["experts"].tolerance[dtype]
    torch.testing.assert_close(got, want, rtol=bound.relative, atol=bound.absolute)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_groups_are_a_stable_sort(seed: int) -> None:
    ids, count = REGISTRY["group_tokens"].sample(random.Random(seed), torch.float32)
    rows, places, offsets = group_tokens(ids, count)
    flat = ids.flatten()
    assert torch.equal(places.flatten().sort().values, torch.arange(len(flat)).int())
    assert torch.equal(rows[places].long(), torch.arange(len(ids)).unsqueeze(1).expand_as(ids))
    assert torch.equal(offsets.diff().long(), flat.bincount(minlength=count))
    for expert in range(count):
        mine = rows[offsets[expert]:offsets[expert + 1]]
        assert torch.equal(mine.long(), (ids == expert).nonzero()[:, 0])


def test_rows_behind_the_groups_are_zero() -> None:
    x, weight = torch.ones(3, 2), torch.ones(2, 4, 2)
    out = group_matmul(x, weight, None, torch.tensor([0, 1, 1], dtype=torch.int32), None)
    assert out.tolist() == [[2.0] * 4, [0.0] * 4, [0.0] * 4]


def test_groups_keep_distant_experts_out() -> None:
    """The best expert of all is in a group whose best two together are not good enough."""
    logits = torch.tensor([[3.0, -9.0, 1.0, 1.0]])
    chosen = [moe_route(logits, torch.zeros(4), 2, "sigmoid", groups)[1].sort().values.tolist()
              for groups in ([1, 1], [2, 1])]
    assert chosen[0][0][0] == 0 and chosen[1] == [[2, 3]]
