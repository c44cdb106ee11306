"""Multi-head latent attention: keys and values of all heads come from one small latent per token.

Shape legend: B batch (1), T tokens, S sequences, H heads, N features of a head without and r with
rotary position, R rank of the latent, V value size, P pages, K tokens per page, M pages per
sequence (block-table width).

The cache of one layer is ``[P, K, R + r]``: a token's normed latent, then its rotated key, which
all heads share; page 0 is scratch, as in :mod:`xllm.ops.attention`. Head h's keys are
``[latent @ w_uk[h].T, k_rope]`` and its values ``latent @ w_uv[h]``. Either they are computed
(*expanded*), or the two matrices move to the query and the result (*absorbed*):

    q_nope . (w_uk latent) = (q_nope w_uk) . latent     sum_i p_i (latent_i w_uv) = (sum_i ...) w_uv

Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1 and appendix C.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from xllm.ops.attention import _attend, attention
from xllm.ops.core import Cost, define, nbytes, randn
from xllm.ops.samples import ragged_batch

FORMS = ("absorbed", "expanded")
#: New tokens of a sequence; fewer save next to nothing, while the matrices are converted for each
#: sequence instead of being read once for all.
FEWEST_EXPANDED = 16


@dataclass(frozen=True)
class HeadSizes:
    """N, r, R and V of the legend."""

    nope: int
    rope: int
    rank: int
    value: int


def form_flops(new: int, cached: int, sizes: HeadSizes) -> tuple[int, int]:
    """Operations per head, absorbed and expanded, of ``new`` tokens behind ``cached`` ones.

    Both attend over the same query-key pairs; absorbed, a pair costs ``2 (R + r)`` for its score
    and ``2 R`` for its value instead of ``2 (N + r)`` and ``2 V``, but the matrices meet the new
    tokens only and not every key.
    """
    pairs = new * cached + new * (new + 1) // 2
    matrices = 2 * sizes.rank * (sizes.nope + sizes.value)
    absorbed = 2 * pairs * (2 * sizes.rank + sizes.rope) + new * matrices
    expanded = 2 * pairs * (sizes.nope + sizes.rope + sizes.value) + (new + cached) * matrices
    return absorbed, expanded


def expands(new: int, cached: int, sizes: HeadSizes) -> bool:
    """Whether a sequence of the batch is computed expanded: where that takes fewer operations.

    With DeepSeek's sizes: from :data:`FEWEST_EXPANDED` new tokens on without cached ones, and from
    about 171 on behind any number of cached ones, which is also where measured times cross
    (``bench/latent.py``).
    """
    absorbed, expanded = form_flops(new, cached, sizes)
    return new >= FEWEST_EXPANDED and expanded < absorbed


def latent_attention(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, scale: float,
) -> Tensor:
    """Causal latent attention over one packed sequence → ``[B, T, H, V]``.

    ``q_nope [B, T, H, N]``, ``q_rope [B, T, H, r]``, ``latent [B, T, R]`` (normed), ``k_rope [B,
    T, r]`` (rotated); ``weight [H (N + V), R]`` as checkpoints store it: a head's N key rows, then
    its V value rows. Expanded, and rounded as a linear layer and :func:`attention` round.
    """
    heads, nope = q_nope.shape[2:]
    expanded = linear(latent, weight).unflatten(-1, (heads, -1))
    shared = k_rope.unsqueeze(2).expand(-1, -1, heads, -1)
    k = torch.cat((expanded[..., :nope], shared), -1)
    return attention(torch.cat((q_nope, q_rope), -1), k, expanded[..., nope:], scale)


def latent_write(latent: Tensor, k_rope: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write ``latent [T, R]`` and ``k_rope [T, r]`` into ``kv_cache [P, K, R + r]``.

    ``slot_mapping [T]`` as in :func:`xllm.ops.attention.kv_write`.
    """
    page_size = kv_cache.shape[1]
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    kv_cache[page, offset] = torch.cat((latent, k_rope), -1)


def paged_latent_attention(
    q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float,
    form: str | None = None,
) -> Tensor:
    """Ragged causal attention of new tokens over paged latents → ``[T, H, V]``.

    ``q_nope [T, H, N]``, ``q_rope [T, H, r]``, ``w_uk [H, N, R]``, ``w_uv [H, R, V]``; the batch
    as in :func:`xllm.ops.attention.paged_attention`. Nothing is rounded but the result, so that
    the forms mean the same: ``form`` is ``absorbed``, ``expanded``, or None, where a kernel
    chooses for each sequence by :func:`expands`.
    """
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    rank, page_size = w_uk.shape[2], kv_cache.shape[1]
    out = q_nope.new_zeros((*q_nope.shape[:2], w_uv.shape[2]))
    q = torch.cat((q_nope, q_rope), -1).to(wide)
    for index, length in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[index : index + 2].tolist()
        if begin == end:
            continue
        pages = block_table[index, : -(-length // page_size)].long()
        cached = kv_cache[pages].flatten(0, 1)[:length].to(wide)
        k_nope = torch.einsum("tr,hnr->thn", cached[:, :rank], w_uk.to(wide))
        shared = cached[:, None, rank:].expand(-1, q.shape[1], -1)
        v = torch.einsum("tr,hrv->thv", cached[:, :rank], w_uv.to(wide))
        out[begin:end] = _attend(q[begin:end], torch.cat((k_nope, shared), -1), v,
                                 length - (end - begin), scale, None, None, None)
    return out


def _fake_attention(q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor,
                    weight: Tensor, scale: float) -> Tensor:
    value = weight.shape[0] // q_nope.shape[2] - q_nope.shape[3]
    return q_nope.new_empty((*q_nope.shape[:3], value))


def _fake_paged(q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor,
                query_start_loc: Tensor, seq_lens: Tensor, w_uk: Tensor, w_uv: Tensor,
                scale: float, form: str | None = None) -> Tensor:
    return q_nope.new_empty((*q_nope.shape[:2], w_uv.shape[2]))


def _shape(rng: random.Random) -> tuple[int, HeadSizes]:
    return rng.choice([
        (4, HeadSizes(8, 4, 16, 8)), (2, HeadSizes(16, 8, 64, 24)), (3, HeadSizes(5, 2, 19, 7)),
        (5, HeadSizes(32, 16, 48, 32)),
    ])


def _sample_attention(rng: random.Random, dtype: torch.dtype) -> tuple:
    (heads, sizes), tokens = _shape(rng), rng.choice([1, 2, 9, 17])
    q_nope = randn(rng, (1, tokens, heads, sizes.nope), dtype)
    q_rope = randn(rng, (1, tokens, heads, sizes.rope), dtype)
    latent, k_rope = (randn(rng, (1, tokens, n), dtype) for n in (sizes.rank, sizes.rope))
    weight = randn(rng, (heads * (sizes.nope + sizes.value), sizes.rank), dtype)
    return q_nope, q_rope, latent, k_rope, weight / sizes.rank**0.5, 0.3


def _sample_write(rng: random.Random, dtype: torch.dtype) -> tuple:
    _, sizes = _shape(rng)
    page_size = rng.choice([1, 16])
    batch = ragged_batch(rng, page_size)
    tokens = len(batch["slot_mapping"])
    latent, k_rope = (randn(rng, (tokens, n), dtype) for n in (sizes.rank, sizes.rope))
    shape = int(batch["num_pages"]), page_size, sizes.rank + sizes.rope
    return latent, k_rope, randn(rng, shape, dtype), batch["slot_mapping"]


def _sample_paged(rng: random.Random, dtype: torch.dtype) -> tuple:
    heads, sizes = _shape(rng)
    page_size = rng.choice([1, 16, 32])
    batch = ragged_batch(rng, page_size)
    tokens = len(batch["slot_mapping"])
    q_nope, q_rope = (randn(rng, (tokens, heads, n), dtype) for n in (sizes.nope, sizes.rope))
    shape = int(batch["num_pages"]), page_size, sizes.rank + sizes.rope
    meta = batch["block_table"], batch["query_start_loc"], batch["seq_lens"]
    w_uk = randn(rng, (heads, sizes.nope, sizes.rank), dtype) / sizes.rank**0.5
    w_uv = randn(rng, (heads, sizes.rank, sizes.value), dtype) / sizes.rank**0.5
    form = rng.choice([None, *FORMS])
    return q_nope, q_rope, randn(rng, shape, dtype), *meta, w_uk, w_uv, 0.3, form


def _attention_cost(q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor,
                    weight: Tensor, scale: float) -> Cost:
    batch, tokens, heads, nope = q_nope.shape
    value = weight.shape[0] // heads - nope
    sizes = HeadSizes(nope, q_rope.shape[3], latent.shape[2], value)
    out_bytes = batch * tokens * heads * value * q_nope.element_size()
    return Cost(batch * heads * form_flops(tokens, 0, sizes)[1],
                nbytes(q_nope, q_rope, latent, k_rope, weight) + out_bytes)


def _write_cost(latent: Tensor, k_rope: Tensor, *rest: object) -> Cost:
    return Cost(0, 2 * nbytes(latent, k_rope))


def _paged_cost(q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor,
                query_start_loc: Tensor, seq_lens: Tensor, w_uk: Tensor, w_uv: Tensor,
                scale: float, form: str | None = None) -> Cost:
    heads, nope, rank = w_uk.shape
    sizes = HeadSizes(nope, q_rope.shape[2], rank, w_uv.shape[2])
    flops = read = 0
    for new, length in zip(query_start_loc.diff().tolist(), seq_lens.tolist(), strict=True):
        chosen = expands(new, length - new, sizes) if form is None else FORMS.index(form)
        flops += heads * form_flops(new, length - new, sizes)[chosen] if new else 0
        read += length * kv_cache[0, 0].nbytes if new else 0
    out_bytes = q_nope.shape[0] * heads * sizes.value * q_nope.element_size()
    return Cost(flops, nbytes(q_nope, q_rope, w_uk, w_uv) + read + out_bytes)


LATENT_ATTENTION = define(
    "latent_attention(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor weight, "
    "float scale) -> Tensor",
    latent_attention, fake=_fake_attention, sample=_sample_attention, cost=_attention_cost,
)
LATENT_WRITE = define(
    "latent_write(Tensor latent, Tensor k_rope, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()",
    latent_write, fake=lambda *args: None, sample=_sample_write, cost=_write_cost,
)
PAGED_LATENT_ATTENTION = define(
    "paged_latent_attention(Tensor q_nope, Tensor q_rope, Tensor kv_cache, Tensor block_table, "
    "Tensor query_start_loc, Tensor seq_lens, Tensor w_uk, Tensor w_uv, float scale, "
    "str? form=None) -> Tensor",
    paged_latent_attention, fake=_fake_paged, sample=_sample_paged, cost=_paged_cost,
)
