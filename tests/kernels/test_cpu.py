"""The C++ kernels against the references of their ops."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm.kernels import CPU_KERNELS, build
from xllm.ops import REGISTRY
from xllm.ops.linear import pack

DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Kernels = dict[str, Callable]


class Loaded:
    """The kernels of one library, called by op name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        torch.ops.load_library(path)

    def __call__(self, name: str, *args: object) -> object:
        return REGISTRY[name].overload(*args)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """The library for this machine's instruction set, compiled once."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    build.compile_cpu(build.detect_isa(), path)
    yield Loaded(path)


def clones(args: tuple) -> tuple:
    """Arguments that an in-place op may change."""
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)


def results(name: str, function: Callable, args: tuple) -> list[torch.Tensor]:
    """What an op returns and what it wrote into its cache argument."""
    args = clones(args)
    out = function(*args)
    tensors = [out] if isinstance(out, torch.Tensor) else []
    if "Tensor(a!)" in REGISTRY[name].schema:
        tensors += [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 5]
    return tensors


def check(kernels: Loaded, name: str, args: tuple, dtype: torch.dtype) -> None:
    """The kernel's results lie within the op's tolerance of the reference's."""
    got = results(name, lambda *a: kernels(name, *a), args)
    want = results(name, REGISTRY[name].reference, args)
    bound = REGISTRY[name].tolerance[dtype]
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=bound.relative, atol=bound.absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(CPU_KERNELS))
@SETTINGS
@given(seed=st.integers(0, 2**32))
def test_samples(kernels: Loaded, name: str, dtype: torch.dtype, seed: int) -> None:
    check(kernels, name, REGISTRY[name].sample(random.Random(seed), dtype), dtype)
