"""The C++ kernels against the references of their ops: drawn samples, shapes, errors."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xllm.kernels import CPU_SOURCES, build
from xllm.ops import REGISTRY
from xllm.ops.core import EXACT
from xllm.ops.linear import pack

DTYPES = [torch.float32, torch.bfloat16]
ISA_VARIABLE = "XLLM_TEST_ISA"
Kernels = Callable[..., object]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(name: str, function: Callable, args: tuple) -> list[Tensor]:
    """What an op returns and what it wrote into its cache argument."""
    args = tuple(a.clone() if isinstance(a, Tensor) and a.is_contiguous() else a for a in args)
    out = function(*args)
    tensors = [out] if isinstance(out, Tensor) else list(out or ())
    written = [s.alias_info is not None for s in REGISTRY[name].overload._schema.arguments]
    return tensors + [a for a, is_written in zip(args, written, strict=False) if is_written]


def check(kernels: Kernels, name: str, *args: object) -> None:
    """The kernel's results lie within the op's tolerance of the reference's."""
    got = results(name, lambda *a: kernels(name, *a), args)
    want = results(name, REGISTRY[name].reference, args)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        bound = REGISTRY[name].tolerance.get(ours.dtype, EXACT)  # integers are exact
        torch.testing.assert_close(ours, theirs, rtol=bound.relative, atol=bound.absolute)


def test_every_kernel_is_registered(kernels: Kernels) -> None:
    for name in CPU_SOURCES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xllm::{name}", "CPU")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(CPU_SOURCES))
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_samples(kernels: Kernels, name: str, dtype: torch.dtype, seed: int) -> None:
    """float64 runs the reference itself."""
    args = REGISTRY[name].sample(random.Random(seed), dtype)
    if dtype != torch.float64:
        return check(kernels, name, *args)
    got = results(name, lambda *a: kernels(name, *a), args)
    for ours, theirs in zip(got, results(name, REGISTRY[name].reference, args), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [*range(41), 127, 512])
def test_linear_rows(kernels: Kernels, tokens: int, dtype: torch.dtype) -> None:
    weight = pack(randn(70, 64, dtype=dtype, seed=1) / 8)
    check(kernels, "packed_linear", randn(tokens, 64, dtype=dtype), weight, None, 70)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (31, 2), (33, 1026), (96, 3072), (2000, 34)])
def test_linear_shapes(kernels: Kernels, rows: int, width: int, dtype: torch.dtype) -> None:
    weight, bias = randn(rows, width, dtype=dtype) / width**0.5, randn(rows, dtype=dtype, seed=1)
    for tokens in (1, 3, 37):
        x = randn(tokens, width, dtype=dtype, seed=2)
        check(kernels, "packed_linear", x, pack(weight), bias, rows)


def test_linear_several_chunks(kernels: Kernels) -> None:
    """x larger than the second-level cache's share."""
    weight, x = randn(64, 3072).bfloat16() / 50, randn(300, 3072, seed=1).bfloat16()
    check(kernels, "packed_linear", x, pack(weight), None, 64)


def test_linear_leading_dimensions_and_strides(kernels: Kernels) -> None:
    weight, x = pack(randn(40, 16)), randn(16, 5, 3, seed=1).permute(2, 1, 0)
    assert kernels("packed_linear", x, weight, None, 40).shape == (3, 5, 40)
    check(kernels, "packed_linear", x, weight, None, 40)
    check(kernels, "packed_linear", x[0, 0], weight, None, 40)


def test_linear_accumulates_in_float32(kernels: Kernels) -> None:
    """A sum of which bfloat16 would lose the small terms."""
    x = torch.ones(1, 1024, dtype=torch.bfloat16)
    weight = pack(torch.ones(32, 1024, dtype=torch.bfloat16))
    assert kernels("packed_linear", x, weight, None, 32).eq(1024).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(kernels: Kernels, dtype: torch.dtype) -> None:
    weight = pack(randn(70, 34, dtype=dtype))
    for ids in (torch.tensor([[0, 69], [31, 32]]), torch.tensor([5], dtype=torch.int32)):
        assert torch.equal(kernels("packed_embedding", weight, ids),
                           REGISTRY["packed_embedding"].reference(weight, ids.long()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 128, 256])
def test_writes_take_strided_arguments(kernels: Kernels, dim: int, dtype: torch.dtype) -> None:
    """k and v as views of qkv, pages of one layer within a cache of two."""
    heads, groups, tokens = 4, 2, 19
    qkv = randn(tokens, (heads + 2 * groups + 1) * dim, dtype=dtype)[:, dim:]
    slots = torch.randperm(80, generator=torch.Generator().manual_seed(3))[:tokens]
    angle = randn(tokens, dim, seed=4)
    norms = [randn(dim, dtype=dtype, seed=i) for i in (5, 6)]
    _, k, v = qkv.unflatten(1, (-1, dim)).split([heads, groups, groups], dim=1)
    caches = [torch.zeros(5, 2, 2, groups, 16, dim, dtype=dtype) for _ in range(4)]
    ours, theirs, fused, plain = (cache[:, 1] for cache in caches)
    kernels("kv_write", k, v, ours, slots)
    REGISTRY["kv_write"].reference(k, v, theirs, slots)
    assert torch.equal(ours, theirs)
    rest = qkv, *norms, 1e-6, angle.cos().to(dtype), angle.sin().to(dtype)
    q = kernels("qk_norm_rope_kv_write", *rest, fused, slots)
    want = REGISTRY["qk_norm_rope_kv_write"].reference(*rest, plain, slots)
    bound = REGISTRY["kv_write"].tolerance[dtype]
    for a, b in ((q, want), (fused, plain)):
        torch.testing.assert_close(a, b, rtol=bound.relative, atol=bound.absolute)
    assert all(cache[:, 0].eq(0).all() for cache in caches)


def test_fused_write_rounds_like_the_reference(kernels: Kernels) -> None:
    """Nearly every bfloat16 result is the same bit for bit."""
    tokens, dim = 64, 128
    qkv, angle = randn(tokens, 8 * dim).bfloat16(), randn(tokens, dim, seed=1)
    norms = [randn(dim, seed=i).bfloat16() for i in (2, 3)]
    args = (qkv, *norms, 1e-6, angle.cos().bfloat16(), angle.sin().bfloat16(),
            torch.zeros(9, 2, 2, 16, dim, dtype=torch.bfloat16), torch.arange(tokens) + 16)
    name = "qk_norm_rope_kv_write"
    got = results(name, lambda *a: kernels(name, *a), args)
    for ours, theirs in zip(got, results(name, REGISTRY[name].reference, args), strict=True):
        assert ours.ne(theirs).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 100, 1024])
def test_elementwise_shapes(kernels: Kernels, width: int, dtype: torch.dtype) -> None:
    """Odd widths, no rows, strided rows; activations far from zero."""
    weight = randn(width, dtype=dtype, seed=1)
    for tokens in (0, 1, 300):
        x, other = (randn(tokens, 2 * width, dtype=dtype, seed=s)[:, :width] for s in (2, 3))
        check(kernels, "rms_norm", x, weight, 1e-6)
        check(kernels, "add_rms_norm", x, other, weight, 1e-6)
        check(kernels, "silu_mul", x * 40, other)


def test_no_tokens(kernels: Kernels) -> None:
    cache, slots = torch.zeros(2, 2, 1, 4, 8), torch.empty(0, dtype=torch.long)
    kernels("kv_write", torch.empty(0, 1, 8), torch.empty(0, 1, 8), cache, slots)
    empty = torch.empty(0, 8)
    out = kernels("qk_norm_rope_kv_write", torch.empty(0, 32), None, None, 1e-6, empty, empty,
                  cache, slots)
    assert out.shape == (0, 2, 8)
    ids = torch.empty(1, 0, dtype=torch.long)
    assert kernels("packed_embedding", torch.zeros(1, 4, 32, 2), ids).shape == (1, 0, 8)
    assert kernels("packed_linear", empty, torch.zeros(1, 4, 32, 2), None, 3).shape == (0, 3)


@pytest.mark.parametrize(("name", "args", "message"), [
    ("packed_linear", (torch.ones(2, 8).half(), torch.ones(1, 4, 32, 2).half(), None, 3),
     "packed_linear: x is Half; expected bfloat16"),
    ("packed_linear", (torch.ones(2, 6), torch.ones(1, 4, 32, 2), None, 3),
     r"packed_linear: weight is Float\[1, 4, 32, 2\]; expected Float\[1, 3, 32, 2\]"),
    ("packed_linear", (torch.ones(2, 8), torch.ones(1, 4, 32, 2), torch.ones(4), 3), "bias is"),
    ("packed_linear", (torch.ones(2, 7), torch.ones(1, 4, 32, 2), None, 3), "7 columns"),
    ("packed_embedding", (torch.ones(1, 4, 32, 2), torch.tensor([32])), "ids contains 32"),
    ("kv_write", (torch.ones(1, 1, 8), torch.ones(1, 1, 8), torch.ones(2, 2, 1, 4, 8),
                  torch.tensor([8])), "slot_mapping contains 8; expected 0 to 7"),
    ("kv_write", (torch.ones(1, 2, 8), torch.ones(1, 1, 8), torch.ones(2, 2, 1, 4, 8),
                  torch.tensor([0])), "kv_write: k is"),
])
def test_wrong_arguments(kernels: Kernels, name: str, args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels(name, *args)


@pytest.mark.slow
@pytest.mark.skipif(ISA_VARIABLE in os.environ, reason="this is the rerun")
@pytest.mark.parametrize("isa", build.ISA_FLAGS)
def test_other_instruction_sets(isa: str) -> None:
    """All tests again, in a process that loads the kernels of another instruction set."""
    if isa == build.detect_isa() or not build.runs_on(isa, build.cpu_features()):
        pytest.skip(f"{isa} is tested already, or not available")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-k", "not build"],
        env={**os.environ, ISA_VARIABLE: isa}, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
