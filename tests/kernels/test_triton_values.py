"""The Triton kernels against the references of their ops, in Triton's interpreter on CPU tensors.

Triton decides at import whether its kernels are interpreted, so these tests run in a process of
their own: ``test_triton_build.py`` starts it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xllm.kernels.triton import MODULES
from xllm.ops import REGISTRY
from xllm.ops.core import Tolerance

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)
tl = pytest.importorskip("triton.language", reason="triton is not installed")
interpreter = import_module("triton.runtime.interpreter")

EXAMPLES = int(os.environ.get("XLLM_TRITON_EXAMPLES", "4"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = {torch.float16: Tolerance(1e-2, 1e-2)}  # the ops' tables have no row for it


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that few programs fill; and dot products of bfloat16, of which the interpreter
    multiplies the bits."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(self: object, a: object, b: object, *rest: object) -> object:
        a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t
                for t in (a, b))
        return plain(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
    monkeypatch.setattr("xllm.kernels.triton.softmax.WANTED_PROGRAMS", 6)


def kernel(name: str) -> Callable[..., object]:
    return getattr(import_module(f"xllm.kernels.triton.{MODULES[name]}"), name)


def results(name: str, function: Callable[..., object], args: tuple) -> list[Tensor]:
    """What an op returns; for one that returns nothing, what it wrote into its third argument."""
    args = tuple(a.clone() if isinstance(a, Tensor) and a.is_contiguous() else a for a in args)
    out = function(*args)
    return [args[2]] if out is None else [out] if isinstance(out, Tensor) else list(out)


def check(name: str, *args: object) -> None:
    """The kernel's results lie within the op's tolerance of the reference's."""
    op = REGISTRY[name]
    for got, want in zip(results(name, kernel(name), args), results(name, op.reference, args),
                         strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        bound = (op.tolerance | HALF).get(got.dtype, Tolerance(0.0, 0.0))
        torch.testing.assert_close(got, want, rtol=bound.relative, atol=bound.absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(MODULES))
@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_samples(name: str, dtype: torch.dtype, seed: int) -> None:
    check(name, *REGISTRY[name].sample(random.Random(seed), dtype))


def batch(new: list[int], lengths: list[int], page_size: int = 16) -> tuple[Tensor, ...]:
    """Block table over shuffled pages, starts and lengths."""
    width = max(-(-n // page_size) for n in lengths) + 1
    order = torch.randperm(len(new) * width, generator=torch.Generator().manual_seed(len(new)))
    table = order.view(len(new), width).int() + 1
    return table, torch.tensor([0, *new]).cumsum(0).int(), torch.tensor(lengths, dtype=torch.int32)


def paged(new: list[int], lengths: list[int], heads: int = 4, groups: int = 2, dim: int = 16,
          dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of ``paged_attention`` up to the lengths; page 0 holds NaN."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    meta = batch(new, lengths)
    cache = torch.randn(meta[0].numel() + 1, 2, groups, 16, dim, generator=generator).to(dtype)
    cache[0] = float("nan")
    return torch.randn(sum(new), heads, dim, generator=generator).to(dtype), cache, *meta


@pytest.mark.parametrize(("new", "lengths"), [
    ([1], [1]), ([1], [300]), ([5], [200]), ([1, 1, 1], [3, 150, 64]), ([70], [90]),
    ([1, 33, 1, 2], [65, 40, 130, 2]),
])
def test_attention_lengths(new: list[int], lengths: list[int]) -> None:
    args = paged(new, lengths)
    check("paged_attention", *args, 0.25)
    check("paged_attention", *args, 0.25, 7, 30.0, torch.tensor([-1.0, 0.0, 2.0, 30.0]))


@pytest.mark.parametrize(("ratio", "dim"), [(1, 8), (3, 24), (5, 72), (71, 16)])
def test_attention_shapes(ratio: int, dim: int) -> None:
    """Ratios and sizes that are no powers of two, in every dtype."""
    for dtype in DTYPES:
        args = paged([1, 3], [40, 30], heads=2 * ratio, dim=dim, dtype=dtype)
        check("paged_attention", *args, 0.3)


def test_attention_splits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (*paged([1], [700], heads=2, groups=1), 0.25, 600)
    results_ = []
    for wanted in (1, 2, 32):
        monkeypatch.setattr("xllm.kernels.triton.softmax.WANTED_PROGRAMS", wanted)
        results_ += [kernel("paged_attention")(*args)]
    for other in results_[1:]:
        torch.testing.assert_close(other, results_[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [1, 16])
def test_attention_outside_sequences(monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    """Rows before and behind the sequences are zero; padded sequences have no new tokens."""
    monkeypatch.setattr("xllm.kernels.triton.softmax.WANTED_PROGRAMS", wanted)
    q, cache, table, starts, lengths = paged([3, 1], [9, 30])
    table = torch.cat((table, torch.zeros(2, table.shape[1], dtype=torch.int32)))
    starts = torch.cat((starts + 2, starts[-1:].expand(2) + 2))
    padded = torch.cat((q[:2] * torch.nan, q, q[:3]))
    args = padded, cache, table, starts, torch.cat((lengths, torch.tensor([0, 9]).int())), 0.25
    out = kernel("paged_attention")(*args)
    assert out[:2].eq(0).all() and out[6:].eq(0).all()
    torch.testing.assert_close(out, REGISTRY["paged_attention"].reference(*args))


def test_attention_of_nothing() -> None:
    q, cache, table, starts, lengths = paged([2], [5])
    assert kernel("paged_attention")(q[:0], cache, table, starts * 0, lengths, 1.0).shape[0] == 0
    none = q, cache, table[:0], starts[:1], lengths[:0]
    assert kernel("paged_attention")(*none, 1.0).eq(0).all()


def test_strided_arguments() -> None:
    """q, k and v as views of qkv; the cache as one layer's pages within a cache of two."""
    q, cache, *meta = paged([1, 4], [100, 50])
    wide = torch.stack((cache, cache), dim=1)[:, 1]
    check("paged_attention", torch.cat((q, q), dim=1)[:, :4], wide, *meta, 0.25)
    k, v = torch.cat((q, q), dim=1)[:, 2:6].split(2, dim=1)
    slots, others = torch.tensor([16, 40, 17, 33, 99]), wide.clone()
    kernel("kv_write")(k, v, wide, slots)
    REGISTRY["kv_write"].reference(k, v, others, slots)
    assert torch.equal(wide[1:], others[1:])


@pytest.mark.parametrize("heads", [3, 16, 40])
def test_latent_heads(heads: int) -> None:
    """Decode and several new tokens; tiles that hold parts of several tokens' heads."""
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + heads))

    table, starts, lengths = batch([1, 3, 1], [130, 40, 1])
    check("paged_latent_attention", draw(5, heads, 8), draw(5, heads, 4),
          draw(table.numel() + 1, 16, 36), table, starts, lengths, draw(heads, 8, 32) / 5,
          draw(heads, 32, 8) / 5, 0.3)


@pytest.mark.parametrize("counts", [[40], [0, 40, 0], [1] * 9, [0, 0, 5, 70, 0, 1], [0, 0]])
def test_group_sizes(counts: list[int]) -> None:
    """Empty groups, one that takes every row, and three rows behind the last offset."""
    generator = torch.Generator().manual_seed(len(counts))
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    weight = torch.randn(len(counts), 70, 40, generator=generator) / 6
    bias = torch.randn(len(counts), 70, generator=generator)
    total = sum(counts) + 3
    rows = torch.randint(7, (total,), generator=generator).int()
    check("group_matmul", torch.randn(7, 40, generator=generator), weight, bias, offsets, rows)
    check("group_matmul", torch.randn(total, 40, generator=generator), weight, None, offsets, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_end_to_end(dtype: torch.dtype) -> None:
    """The grouped kernels together mean ``xllm.experts``."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 32, generator=generator).to(dtype)
    up, down = (torch.randn(s, generator=generator).to(dtype) / 6 for s in ((7, 48, 32),
                                                                          (7, 32, 24)))
    ids = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(9)])
    weights = torch.rand(9, 3, generator=generator).to(dtype)
    rows, places, offsets = kernel("group_tokens")(ids, 7)
    both = kernel("group_matmul")(x, up, None, offsets, rows)
    hidden = REGISTRY["gated_activation"].reference(both, "silu")
    y = kernel("group_matmul")(hidden, down, None, offsets, None)
    want = REGISTRY["experts"].reference(x, ids, weights, up, down, None, None, "silu")
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(kernel("combine_experts")(y, places, weights), want, rtol=bound,
                               atol=bound)


@pytest.mark.parametrize(("args", "message"), [
    ((torch.ones(1, 4, 8), torch.ones(2, 2, 2, 4, 8).half()), "kv_cache is torch.float16"),
    ((torch.ones(1, 4, 8).double(), torch.ones(2, 2, 2, 4, 8).double()), "q is torch.float64"),
    ((torch.ones(1, 8, 4).mT, torch.ones(2, 2, 2, 4, 8)), "last dimension of q has stride 4"),
])
def test_wrong_arguments(args: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"paged_attention: .*{message}"):
        kernel("paged_attention")(*args, *batch([1], [3], 4), 1.0)
