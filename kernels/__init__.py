"""Hand-written kernels for ops of ``torch.ops.xllm``, bound late by (op, target).

A kernel has a reference (the op's, in ``xllm/ops``), a tolerance (the op's) and a bench
(``bench/kernels.py``). Nothing here runs at import.
"""

from __future__ import annotations

# op → C++ source in ``cpu/`` that implements it on CPU tensors.
CPU_SOURCES: dict[str, str] = {
    "packed_linear": "linear.cpp",
    "packed_embedding": "linear.cpp",
    "quant_linear": "quant_linear.cpp",
    "kv_write": "kv_write.cpp",
    "qk_norm_rope_kv_write": "kv_write.cpp",
    "paged_attention": "attention.cpp",
    "latent_write": "latent.cpp",
    "paged_latent_attention": "latent.cpp",
    "segment_attention": "bindings_vision.cpp",
    "group_tokens": "group_matmul.cpp",
    "group_matmul": "bindings_moe.cpp",
    "packed_group_matmul": "group_matmul.cpp",
    "combine_experts": "group_matmul.cpp",
    "rms_norm": "elementwise.cpp",
    "add_rms_norm": "elementwise.cpp",
    "silu_mul": "elementwise.cpp",
}
# Elementwise ops, compiled for graphs that are interpreted; Inductor's own fusions are as good.
LEFT_TO_INDUCTOR: frozenset[str] = frozenset({"rms_norm", "add_rms_norm", "silu_mul"})
# Ops that lowering calls as kernels.
CPU_KERNELS: frozenset[str] = frozenset(CPU_SOURCES) - LEFT_TO_INDUCTOR
