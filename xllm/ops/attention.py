"""Causal attention: the captured form over one packed sequence, and the paged form over a KV cache.

Shape legend: B batch (1), T tokens, S sequences, H query heads, G KV heads, D head size,
P pages, K tokens per page, M pages per sequence (block-table width).

The KV cache of one layer is ``[P, 2, G, K, D]`` (keys, then values); page 0 is never read: padded
rows write there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xllm.ops.core import Cost, define, nbytes
from xllm.ops.samples import sample_attention, sample_fused_write, sample_kv_write, sample_paged


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``[T, H, D], [N, G, D]`` → float32 scores ``[H, T, N]`` with grouped KV heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("thd,nhd->htn", q.to(wide), k.to(wide)) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, first: int, scale: float,
    window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:
    """Queries at positions ``first ...`` against keys at positions ``0 ...``: ``[T, H, D]``.

    ``window`` keeps the last ``window`` positions, the query's own included; ``sinks [H]`` adds
    one logit per head to the softmax denominator.
    """
    scores = _scores(q, k, scale, softcap)
    query = torch.arange(first, first + q.shape[0]).unsqueeze(1)
    key = torch.arange(k.shape[0]).unsqueeze(0)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[0]]
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).to(scores.dtype)
    return torch.einsum("htn,nhd->thd", weights, v).to(q.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """Causal self-attention ``q [B, T, H, D]``, ``k [B, T, G, D]``, ``v [B, T, G, V]`` →
    ``[B, T, H, V]``; V is D everywhere but in latent attention, before it is absorbed.

    Softmax and accumulation in float32. Source: Vaswani et al. 2017; grouped: Ainslie et al. 2023.
    """
    options = (scale, window, softcap, sinks)
    return torch.stack([_attend(*qkv, 0, *options) for qkv in zip(q, k, v, strict=True)])


def kv_write(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write ``k, v [T, G, D]`` into ``kv_cache [P, 2, G, K, D]`` at ``slot_mapping [T]``.

    A slot is ``page * K + offset``. Slots of page 0 are scratch and may repeat.
    """
    page_size = kv_cache.shape[3]
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    kv_cache[page, 0, :, offset] = k
    kv_cache[page, 1, :, offset] = v


def paged_attention(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
    scale: float, window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Ragged causal attention of new tokens over paged keys and values → ``[T, H, D]``.

    ``q [T, H, D]``; ``block_table [S, M]`` int32 page numbers; ``query_start_loc [S + 1]`` int32
    offsets of each sequence's rows in q; ``seq_lens [S]`` int32 lengths including the new tokens,
    whose keys are already in the cache. Rows outside every sequence come back as zeros.
    Source: Kwon et al. 2023 (PagedAttention).
    """
    out = torch.zeros_like(q)
    page_size = kv_cache.shape[3]
    for index, length in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[index : index + 2].tolist()
        if begin == end:
            continue
        pages = block_table[index, : -(-length // page_size)].long()
        cached = kv_cache[pages].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
        out[begin:end] = _attend(
            q[begin:end], cached[0], cached[1], length - (end - begin),
            scale, window, softcap, sinks,
        )
    return out


def qk_norm_rope_kv_write(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor,
    sin: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
) -> Tensor:
    """Split ``qkv [T, (H + 2 G) D]``, norm and rotate q and k, write k and v → q ``[T, H, D]``.

    ``q_norm, k_norm [D]`` (both or neither); ``cos, sin [T, D]``; the cache as in
    :func:`kv_write`. G and D are the cache's. Each step rounds as the unfused ops do.
    """
    from xllm.ops.norm import rms_norm
    from xllm.ops.rope import rope

    groups, dim = kv_cache.shape[2], kv_cache.shape[4]
    heads = qkv.shape[1] // dim - 2 * groups
    q, k, v = qkv.view(qkv.shape[0], -1, dim).split([heads, groups, groups], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    kv_write(rope(k, cos, sin), v, kv_cache, slot_mapping)
    return rope(q, cos, sin).contiguous()


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *options: object) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _fake_like_q(q: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _fake_fused_write(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor,
    sin: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
) -> Tensor:
    groups, dim = kv_cache.shape[2], kv_cache.shape[4]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // dim - 2 * groups, dim))


def _attention_cost(q: Tensor, k: Tensor, v: Tensor, *options: object) -> Cost:
    return Cost(2 * q.numel() * k.shape[1], nbytes(q, q, k, v))


def _paged_cost(q: Tensor, kv_cache: Tensor, block_table: Tensor, query_start_loc: Tensor,
                seq_lens: Tensor, *options: object) -> Cost:
    page_bytes = kv_cache[0].numel() * kv_cache.element_size()
    page_size = kv_cache.shape[3]
    pages = int((seq_lens + page_size - 1).div(page_size, rounding_mode="floor").sum())
    flops = 4 * q.numel() * int(seq_lens.max())
    return Cost(flops, nbytes(q, q) + pages * page_bytes)


def _write_cost(k: Tensor, v: Tensor, *rest: object) -> Cost:
    return Cost(0, 2 * nbytes(k, v))


def _fused_cost(qkv: Tensor, *rest: object) -> Cost:
    return Cost(8 * qkv.numel(), 2 * nbytes(qkv))


ATTENTION = define(
    "attention(Tensor q, Tensor k, Tensor v, float scale, int? window=None, float? softcap=None, "
    "Tensor? sinks=None) -> Tensor",
    attention, fake=_fake_attention, sample=sample_attention, cost=_attention_cost,
)
KV_WRITE = define(
    "kv_write(Tensor k, Tensor v, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()",
    kv_write, fake=lambda *args: None, sample=sample_kv_write, cost=_write_cost,
)
PAGED_ATTENTION = define(
    "paged_attention(Tensor q, Tensor kv_cache, Tensor block_table, Tensor query_start_loc, "
    "Tensor seq_lens, float scale, int? window=None, float? softcap=None, Tensor? sinks=None)"
    " -> Tensor",
    paged_attention, fake=_fake_like_q, sample=sample_paged, cost=_paged_cost,
)
QK_NORM_ROPE_KV_WRITE = define(
    "qk_norm_rope_kv_write(Tensor qkv, Tensor? q_norm, Tensor? k_norm, float eps, Tensor cos, "
    "Tensor sin, Tensor(a!) kv_cache, Tensor slot_mapping) -> Tensor",
    qk_norm_rope_kv_write, fake=_fake_fused_write, sample=sample_fused_write, cost=_fused_cost,
)
