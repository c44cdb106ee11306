"""The pass table: which passes run, in which order. The table is the registry."""

from __future__ import annotations

from xllm.passes import (
    cse,
    drop_noops,
    fuse_add_rms_norm,
    fuse_qk_norm_rope_kv_write,
    lower,
    merge_projections,
    pack_linear,
    page_attention,
    recognise_rms_norm,
    recognise_rope,
    recognise_silu_mul,
    roll_layers,
    select_logits_rows,
    static_views,
)
from xllm.passes.core import describe

PIPELINE = tuple(describe(module) for module in (
    static_views,
    drop_noops,
    cse,
    recognise_rms_norm,
    recognise_rope,
    recognise_silu_mul,
    drop_noops,
    select_logits_rows,
    roll_layers,
    page_attention,
    merge_projections,
    fuse_add_rms_norm,
    fuse_qk_norm_rope_kv_write,
    pack_linear,
    lower,
))
