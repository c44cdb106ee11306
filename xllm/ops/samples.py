"""Sample arguments for the attention ops: ragged batches over shuffled pages."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from xllm.ops.core import randn


def ragged_batch(rng: random.Random, page_size: int) -> dict[str, Tensor]:
    """Metadata of 1 to 4 sequences that mix decode, chunked prefill and whole prompts.

    Keys as the graph inputs: ``block_table [S, M]``, ``query_start_loc [S + 1]``, ``seq_lens
    [S]``, ``slot_mapping [T]``, ``positions [T]``, and ``num_pages`` as a 0-d tensor.
    """
    sequences = rng.randint(1, 4)
    new = [rng.choice([1, 1, 2, page_size, page_size + 1]) for _ in range(sequences)]
    lens = [n + rng.choice([0, 1, page_size - 1, page_size, 3 * page_size]) for n in new]
    width = max(-(-n // page_size) for n in lens) + rng.randint(0, 2)
    pages = list(range(1, sequences * width + 1))
    rng.shuffle(pages)
    table = torch.tensor(pages, dtype=torch.int32).view(sequences, width)
    positions = [p for n, length in zip(new, lens, strict=True) for p in range(length - n, length)]
    rows = [i for i, n in enumerate(new) for _ in range(n)]
    slots = [
        int(table[row, p // page_size]) * page_size + p % page_size
        for row, p in zip(rows, positions, strict=True)
    ]
    starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    return {
        "block_table": table,
        "query_start_loc": torch.tensor(starts, dtype=torch.int32),
        "seq_lens": torch.tensor(lens, dtype=torch.int32),
        "slot_mapping": torch.tensor(slots),
        "positions": torch.tensor(positions),
        "num_pages": torch.tensor(len(pages) + 1),
    }


def _shape(rng: random.Random) -> tuple[int, int, int]:
    """(query heads, KV heads, head size)."""
    return rng.choice([(4, 2, 16), (2, 2, 8), (8, 1, 32), (6, 2, 64), (4, 4, 128)])


def _options(rng: random.Random, heads: int) -> tuple:
    window = rng.choice([None, None, 1, 5, 40])
    softcap = rng.choice([None, None, 20.0])
    sinks = randn(rng, (heads,), torch.float32) if rng.random() < 0.3 else None
    return window, softcap, sinks


def sample_attention(rng: random.Random, dtype: torch.dtype) -> tuple:
    """Arguments of ``attention``."""
    (heads, groups, dim), tokens = _shape(rng), rng.choice([1, 2, 9, 17])
    q = randn(rng, (1, tokens, heads, dim), dtype)
    k, v = (randn(rng, (1, tokens, groups, dim), dtype) for _ in range(2))
    return q, k, v, dim**-0.5, *_options(rng, heads)


def sample_kv_write(rng: random.Random, dtype: torch.dtype) -> tuple:
    """Arguments of ``kv_write``."""
    _, groups, dim = _shape(rng)
    page_size = rng.choice([1, 16])
    batch = ragged_batch(rng, page_size)
    tokens = len(batch["slot_mapping"])
    k, v = (randn(rng, (tokens, groups, dim), dtype) for _ in range(2))
    cache = randn(rng, (int(batch["num_pages"]), 2, groups, page_size, dim), dtype)
    return k, v, cache, batch["slot_mapping"]


def sample_paged(rng: random.Random, dtype: torch.dtype) -> tuple:
    """Arguments of ``paged_attention``."""
    heads, groups, dim = _shape(rng)
    page_size = rng.choice([1, 16, 32])
    batch = ragged_batch(rng, page_size)
    q = randn(rng, (len(batch["slot_mapping"]), heads, dim), dtype)
    cache = randn(rng, (int(batch["num_pages"]), 2, groups, page_size, dim), dtype)
    meta = batch["block_table"], batch["query_start_loc"], batch["seq_lens"]
    return q, cache, *meta, dim**-0.5, *_options(rng, heads)


def sample_fused_write(rng: random.Random, dtype: torch.dtype) -> tuple:
    """Arguments of ``qk_norm_rope_kv_write``."""
    heads, groups, dim = _shape(rng)
    page_size = rng.choice([1, 16])
    batch = ragged_batch(rng, page_size)
    tokens = len(batch["slot_mapping"])
    norms = [randn(rng, (dim,), dtype) for _ in range(2)] if rng.random() < 0.5 else [None, None]
    angle = randn(rng, (tokens, dim), torch.float32)
    qkv = randn(rng, (tokens, (heads + 2 * groups) * dim), dtype)
    cache = randn(rng, (int(batch["num_pages"]), 2, groups, page_size, dim), dtype)
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    return qkv, *norms, 1e-6, *tables, cache, batch["slot_mapping"]
