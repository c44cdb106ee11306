"""Kernels in Triton for NVIDIA GPUs: the table of what exists, and the ops made of it.

Importing this package does not import triton; :func:`triton_ops` does.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch

from xllm.errors import UserError
from xllm.ops import REGISTRY

# op → module of this package with a function of that name: the op on CUDA tensors.
MODULES: dict[str, str] = {
    "paged_attention": "paged_attention",
    "paged_latent_attention": "latent_attention",
    "kv_write": "cache_write",
    "latent_write": "cache_write",
    "group_tokens": "experts",
    "group_matmul": "group_matmul",
    "combine_experts": "experts",
}


class TritonMissing(UserError, ImportError):
    """The package triton is not installed."""


@cache
def triton_ops() -> dict[str, torch._ops.OpOverload]:
    """``torch.ops.xllm_triton.<op>`` by op: the schema of ``xllm::<op>``, and launches in sight.

    Each is a ``torch.library.triton_op``: Inductor replaces it by its launches, so that an
    AOTInductor package holds the compiled kernels and needs no Triton to run.
    """
    try:
        import_module("triton")
    except ImportError as error:
        raise TritonMissing("the CUDA kernels need triton; install xllm[cuda]") from error
    found = {}
    for name, module in MODULES.items():
        function = getattr(import_module(f"{__name__}.{module}"), name)
        arguments = REGISTRY[name].overload._schema.arguments
        mutated = {a.name for a in arguments if a.alias_info and a.alias_info.is_write}
        torch.library.triton_op(f"xllm_triton::{name}", function, mutates_args=mutated)
        found[name] = getattr(torch.ops.xllm_triton, name).default
    return found
