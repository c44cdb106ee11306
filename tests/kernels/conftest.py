"""One compiled library for all kernel tests of a session."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from xllm.kernels import build
from xllm.ops import REGISTRY

ISA_VARIABLE = "XLLM_TEST_ISA"  # set where a test reruns these tests for another instruction set

Kernels = Callable[..., object]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """``kernels(name, *args)`` calls a CPU kernel; compiled for this machine, or as asked."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    build.compile_cpu(os.environ.get(ISA_VARIABLE) or build.detect_isa(), path)
    torch.ops.load_library(path)
    return lambda name, *args: REGISTRY[name].overload(*args)
