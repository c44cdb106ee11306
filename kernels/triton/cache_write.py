"""``xllm.kv_write`` and ``xllm.latent_write``: new tokens into the pages of a cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from xllm.kernels.triton.launch import same_dtype


@triton.jit
def copy(x: tl.tensor, target: tl.tensor, value: tl.tensor, head_stride: tl.tensor,
         group_stride: tl.tensor, WIDTH: tl.constexpr, D: tl.constexpr) -> None:
    """Values ``value`` of a token, of ``WIDTH`` in heads of ``D``, to the token's slot."""
    head, dim, mask = value // D, value % D, value < WIDTH
    values = tl.load(x + head * head_stride + dim, mask=mask)
    tl.store(target + head * group_stride + dim, values, mask=mask)


@triton.jit
def write(a: tl.tensor, b: tl.tensor, cache: tl.tensor, slot_mapping: tl.tensor,
          a_stride: tl.tensor, a_head_stride: tl.tensor, b_stride: tl.tensor,
          b_head_stride: tl.tensor, page_stride: tl.tensor, group_stride: tl.tensor,
          slot_stride: tl.tensor, offset: tl.tensor, HEADS: tl.constexpr, D_A: tl.constexpr,
          D_B: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Part of one token: ``a`` at the start of its slot, ``b`` at ``offset`` from there."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = cache + slot // PAGE * page_stride + slot % PAGE * slot_stride
    copy(a + token * a_stride, target, value, a_head_stride, group_stride, HEADS * D_A, D_A)
    copy(b + token * b_stride, target + offset, value, b_head_stride, group_stride, HEADS * D_B,
         D_B)


def kv_write(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """``xllm.kv_write`` on the device."""
    same_dtype("kv_write", kv_cache=kv_cache, k=k, v=v)
    tokens, groups, dim = k.shape
    page, keys, group, slot, _ = kv_cache.stride()
    block = min(1024, triton.next_power_of_2(groups * dim))
    wrap_triton(write)[(tokens, triton.cdiv(groups * dim, block))](
        k, v, kv_cache, slot_mapping, *k.stride()[:2], *v.stride()[:2], page, group, slot, keys,
        groups, dim, dim, kv_cache.shape[3], block, num_warps=4,
    )


def latent_write(latent: Tensor, k_rope: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """``xllm.latent_write`` on the device."""
    same_dtype("latent_write", kv_cache=kv_cache, latent=latent, k_rope=k_rope)
    (tokens, rank), rope, (page, slot, _) = latent.shape, k_rope.shape[1], kv_cache.stride()
    wrap_triton(write)[(tokens, 1)](
        latent, k_rope, kv_cache, slot_mapping, latent.stride(0), 0, k_rope.stride(0), 0, page, 0,
        slot, rank, 1, rank, rope, kv_cache.shape[1], triton.next_power_of_2(max(rank, rope)),
        num_warps=4,
    )
