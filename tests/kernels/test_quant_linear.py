"""quant_linear in C++ against its reference: every code, numbers of rows, edges, errors."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xllm.ops import REGISTRY
from xllm.ops.quant_linear import KINDS, draw_codes, pack_codes, pack_grid

Kernels = Callable[..., object]
reference = REGISTRY["quant_linear"].reference


def problem(kind: str, rows: int, width: int, group: int, zeros: bool, seed: int = 0
            ) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of a weight whose rows have a norm of about 1."""
    generator = torch.Generator().manual_seed(seed)
    grid = rows, -(-width // group)
    scales = (1 + torch.rand(grid, generator=generator)) / KINDS[kind][1] / width**0.5
    points = torch.randint(-8, 9, grid, generator=generator).to(torch.int8)
    codes = draw_codes(random.Random(seed), rows, width, kind)
    return (pack_codes(codes, kind), pack_grid(scales), pack_grid(points) if zeros else None)


def compare(kernels: Kernels, x: Tensor, *rest: object) -> None:
    """Against the reference in float64: float32 sums, then one rounding."""
    got = kernels("quant_linear", x, *rest)
    bias = rest[3].double() if isinstance(rest[3], Tensor) else None
    want = reference(x.double(), *rest[:3], bias, *rest[4:]).to(x.dtype)
    bound = REGISTRY["quant_linear"].tolerance[x.dtype]
    torch.testing.assert_close(got, want, rtol=bound.relative, atol=bound.absolute)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 11, 12, 13, 24, 47, 48, 49, 300])
def test_rows(kernels: Kernels, kind: str, tokens: int, zeros: bool) -> None:
    parts = problem(kind, 70, 264, 128, zeros)
    generator = torch.Generator().manual_seed(tokens)
    x, bias = torch.randn(tokens, 264, generator=generator), torch.randn(70, generator=generator)
    compare(kernels, x, *parts, bias, 70, 128)
    compare(kernels, x.bfloat16(), *parts, None, 70, 128)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width", "group"), [
    (1, 8, 8), (31, 16, 16), (33, 1024, 1024), (96, 3072, 32), (2000, 40, 24), (64, 72, 4096)])
def test_shapes(kernels: Kernels, kind: str, rows: int, width: int, group: int) -> None:
    for tokens in (1, 5, 60):
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
        compare(kernels, x, *problem(kind, rows, width, group, True), None, rows, group)


def test_several_chunks(kernels: Kernels) -> None:
    """x larger than the second-level cache's share."""
    x = torch.randn(300, 3072, generator=torch.Generator().manual_seed(0)).bfloat16()
    compare(kernels, x, *problem("int4", 64, 3072, 128, True), None, 64, 128)


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_exact(kernels: Kernels, kind: str, tokens: int) -> None:
    """A row of x that picks one input shows the codes themselves; subnormal float8 too."""
    if kind == "fp8":
        bits = torch.arange(256, dtype=torch.uint8)
        values = bits[(bits & 127) != 127].view(torch.float8_e4m3fn)
    else:
        values = torch.arange(-KINDS[kind][1] - 1, KINDS[kind][1] + 1).to(torch.int8)
    codes = values.view(torch.int8).view(-1, 1).repeat(1, 8).view(values.dtype)
    x = torch.zeros(tokens, 8)
    x[:, 5] = 1
    rows = len(values)
    got = kernels("quant_linear", x, pack_codes(codes, kind), pack_grid(torch.ones(rows, 1)), None,
                  None, rows, 8)
    assert torch.equal(got, values.float().expand(tokens, -1))


def test_leading_dimensions_and_strides(kernels: Kernels) -> None:
    parts = problem("int8", 40, 16, 8, True)
    x = torch.randn(16, 5, 3, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)
    assert kernels("quant_linear", x, *parts, None, 40, 8).shape == (3, 5, 40)
    compare(kernels, x, *parts, None, 40, 8)


CODES, SCALES = torch.ones(1, 8, 32, dtype=torch.int8), torch.ones(1, 1, 32)


@pytest.mark.parametrize(("args", "message"), [
    ((torch.ones(2, 7), CODES, SCALES, None, None, 3, 8), "7 columns; expected a multiple of 8"),
    ((torch.ones(2, 8), CODES, SCALES, None, None, 3, 4), "group_size is 4"),
    ((torch.ones(2, 8), CODES, SCALES, None, None, 0, 8), "rows is 0"),
    ((torch.ones(2, 8), CODES.short(), SCALES, None, None, 3, 8), "codes is Short; expected int8"),
    ((torch.ones(2, 8), CODES.int(), SCALES, None, None, 3, 8), r"codes is Int\[1, 8, 32\]"),
    ((torch.ones(2, 8), CODES, SCALES.half(), None, None, 3, 8), "scales is Half"),
    ((torch.ones(2, 8), CODES, SCALES, SCALES, None, 3, 8), "zeros is Float"),
    ((torch.ones(2, 8), CODES, SCALES, None, torch.ones(4), 3, 8), r"bias is Float\[4\]"),
    ((torch.ones(2, 8).half(), CODES, SCALES, None, None, 3, 8), "x is Half"),
])
def test_wrong_arguments(kernels: Kernels, args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels("quant_linear", *args)
