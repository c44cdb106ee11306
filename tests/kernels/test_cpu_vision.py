"""The C++ kernel of segment attention: edges of segments, strides, sizes of a tower, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xllm.ops.vision import SEGMENT_ATTENTION, segment_attention

Kernels = Callable[..., object]


def tensors(rows: int, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as a tower makes them: three views of one projection."""
    generator = torch.Generator().manual_seed(rows)
    qkv = torch.randn(rows, 3, heads, dim, generator=generator).to(dtype)
    return list(qkv.unbind(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", [
    [0, 64, 128, 192, 200, 232], [0, 0, 4, 4, 4, 8, 9], [3, 7, 11, 15], [0, 1, 2, 3], [0, 300],
    [0], [5]])
def test_segments(kernels: Kernels, bounds: list[int], dtype: torch.dtype) -> None:
    """Runs of equal segments, empty ones, rows outside every segment, one segment, none."""
    q, k, v = tensors(bounds[-1] + 2, 16, 80, dtype)
    offsets = torch.tensor(bounds, dtype=torch.int32)
    limit = SEGMENT_ATTENTION.tolerance[dtype]
    torch.testing.assert_close(kernels("segment_attention", q, k, v, offsets, 0.11),
                               segment_attention(q, k, v, offsets, 0.11),
                               rtol=limit.relative, atol=limit.absolute)


@pytest.mark.parametrize(("change", "message"), [
    ({"cu_seqlens": [0, 9]}, r"cu_seqlens contains 9 at 1; expected ascending, 0 to 8"),
    ({"cu_seqlens": [-1, 8]}, r"cu_seqlens contains -1 at 0"),
    ({"cu_seqlens": [0, 5, 4]}, r"cu_seqlens contains 4 at 2"),
    ({"cu_seqlens": []}, r"cu_seqlens is Int\[0\]; expected Int\[B \+ 1\]"),
    ({"k": torch.zeros(7, 2, 8)}, r"k is Float\[7, 2, 8\]; expected Float\[8, 2, 8\]"),
    ({"v": torch.zeros(8, 2, 8).bfloat16()}, r"v is BFloat16"),
    ({"q": torch.zeros(8, 2, 8, dtype=torch.int32)}, r"q is Int; expected bfloat16"),
])
def test_errors(kernels: Kernels, change: dict, message: str) -> None:
    arguments = dict.fromkeys("qkv", torch.zeros(8, 2, 8)) | {"cu_seqlens": [0, 8]} | change
    arguments["cu_seqlens"] = torch.tensor(arguments["cu_seqlens"], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="xllm::segment_attention: " + message):
        kernels("segment_attention", *arguments.values(), 1.0)
