"""Table of targets: what each can run, as data that passes and backends read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xllm.errors import UserError

DTYPES = {str(d).removeprefix("torch."): d
          for d in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64,
                    torch.int8, torch.float8_e4m3fn)}


class UnknownTarget(UserError, ValueError):
    """A target, backend or dtype that the table does not have."""


@dataclass(frozen=True)
class Target:
    """One row.

    ``kernels`` are the ops of ``torch.ops.xllm`` that stay ops down to the lowered graph because
    the target has a kernel for them; all others are lowered to aten. ``dtypes`` maps a checkpoint
    dtype to the dtype served. ``packed_dtypes`` are those whose linear weights are packed.
    """

    name: str
    device: str
    backend: str
    dtypes: dict[torch.dtype, torch.dtype]
    kernels: frozenset[str]
    packed_dtypes: frozenset[torch.dtype]
    static_buckets: tuple[int, ...]

    def served_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Dtype served for a checkpoint stored in ``stored``."""
        return self.dtypes[stored]


_CPU_DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.bfloat16,  # no float16 kernels on the CPU
}

TARGETS = {
    "cpu": Target(
        name="cpu",
        device="cpu",
        backend="inductor",
        dtypes=_CPU_DTYPES,
        kernels=frozenset({
            "paged_attention", "paged_latent_attention", "kv_write", "latent_write",
            "qk_norm_rope_kv_write", "packed_linear", "packed_embedding", "segment_attention",
            "quant_linear", "group_tokens", "group_matmul", "packed_group_matmul",
            "combine_experts",
        }),
        packed_dtypes=frozenset({torch.bfloat16}),
        static_buckets=(),
    ),
}


def find(name: str) -> Target:
    """The target called ``name``; raises :class:`UnknownTarget` that names the alternatives."""
    if name not in TARGETS:
        raise UnknownTarget(f"--target is {name!r}; accepted: {', '.join(TARGETS)}")
    return TARGETS[name]
