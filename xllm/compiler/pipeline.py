"""The pass table: which passes run, in which order. The table is the registry."""

from __future__ import annotations

from xllm.passes import (
    absorb_mla,
    check_tokens,
    cse,
    drop_noops,
    fold_parameters,
    fuse_add_rms_norm,
    fuse_qk_norm_rope_kv_write,
    group_experts,
    keep_quantized,
    lower,
    merge_projections,
    norm_before_transpose,
    pack_experts,
    pack_linear,
    pad_values,
    page_attention,
    recognise_moe_route,
    recognise_rms_norm,
    recognise_rope,
    recognise_silu_mul,
    roll_layers,
    select_logits_rows,
    spell_casts,
    static_views,
)
from xllm.passes.core import describe

PIPELINE = tuple(describe(module) for module in (
    static_views,
    spell_casts,
    drop_noops,
    cse,
    recognise_rms_norm,
    fold_parameters,
    norm_before_transpose,
    recognise_rope,
    recognise_silu_mul,
    recognise_moe_route,
    drop_noops,
    absorb_mla,
    check_tokens,
    select_logits_rows,
    roll_layers,
    pad_values,
    page_attention,
    group_experts,
    merge_projections,
    fuse_add_rms_norm,
    fuse_qk_norm_rope_kv_write,
    keep_quantized,
    pack_linear,
    pack_experts,
    lower,
))

#: Of the encode graph of a model that sees images: nothing is paged, no logits are selected.
ENCODE_PIPELINE = tuple(describe(module) for module in (
    static_views,
    drop_noops,
    cse,
    recognise_rms_norm,
    recognise_silu_mul,
    drop_noops,
    roll_layers,
    merge_projections,
    fuse_add_rms_norm,
    pack_linear,
    lower,
))
