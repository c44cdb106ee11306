"""The Triton kernels without a GPU: compiled to machine code for two generations, traced as
Inductor traces them, and their values in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from xllm.kernels.triton import MODULES, triton_ops
from xllm.ops import REGISTRY

triton = pytest.importorskip("triton", reason="triton is not installed")
GPUTarget = import_module("triton.backends.compiler").GPUTarget
ASTSource = import_module("triton.compiler").ASTSource

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # a thread block's most; CUDA C guide, table 21
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
            torch.int32: "*i32", torch.int64: "*i64"}
Launch = tuple[object, tuple, dict]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def batch(sequences: int, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Block table, starts and lengths."""
    shapes = (sequences, width), (sequences + 1,), (sequences,)
    table, starts, lengths = (meta(*s, dtype=torch.int32) for s in shapes)
    return table, starts, lengths


def attention(tokens: int, sequences: int, heads: int, groups: int, dim: int,
              dtype: torch.dtype, *options: object) -> tuple:
    cache = meta(99, 2, groups, 16, dim, dtype=dtype)
    return meta(tokens, heads, dim, dtype=dtype), cache, *batch(sequences), 0.1, *options


def latent(tokens: int, sequences: int, heads: int, dtype: torch.dtype) -> tuple:
    """DeepSeek V3's sizes."""
    shapes = (tokens, heads, 128), (tokens, heads, 64), (99, 64, 576)
    weights = (heads, 128, 512), (heads, 512, 128)
    return (*(meta(*s, dtype=dtype) for s in shapes), *batch(sequences),
            *(meta(*s, dtype=dtype) for s in weights), 0.1)


def grouped(rows: int, bias: bool, dtype: torch.dtype) -> tuple:
    """Qwen3-30B-A3B's sizes."""
    ints = [meta(n, dtype=torch.int32) for n in (129, rows)]
    added = meta(128, 1536, dtype=dtype) if bias else None
    return meta(64, 2048, dtype=dtype), meta(128, 1536, 2048, dtype=dtype), added, *ints


# name → op, its arguments by dtype, whether its dot products fill a Hopper warp group's
CASES: dict[str, tuple[str, Callable[[torch.dtype], tuple], bool]] = {
    "decode": ("paged_attention", lambda d: attention(1, 1, 32, 8, 128, d), False),
    "decode-all-options": ("paged_attention", lambda d: attention(
        512, 512, 64, 8, 64, d, 128, 30.0, meta(64)), False),
    "extend": ("paged_attention", lambda d: attention(2048, 4, 32, 8, 128, d), True),
    "extend-256": ("paged_attention", lambda d: attention(2048, 4, 16, 8, 256, d), False),
    "decode-576": ("paged_attention", lambda d: attention(4, 4, 16, 1, 576, d), False),
    "latent": ("paged_latent_attention", lambda d: latent(4, 4, 128, d), True),
    "latent-16-heads": ("paged_latent_attention", lambda d: latent(4, 4, 16, d), False),
    "few-rows": ("group_matmul", lambda d: grouped(8, False, d), False),
    "some-rows": ("group_matmul", lambda d: grouped(4096, True, d), True),
    "many-rows": ("group_matmul", lambda d: grouped(16384, False, d), True),
    "combine": ("combine_experts", lambda d: (
        meta(2048, 2048, dtype=d), meta(256, 8, dtype=torch.int32), meta(256, 8, dtype=d)), False),
    "group": ("group_tokens", lambda d: (meta(256, 8, dtype=torch.int64), 128), False),
    "kv_write": ("kv_write", lambda d: (
        *(meta(7, 8, 128, dtype=d) for _ in "kv"), meta(9, 2, 8, 16, 128, dtype=d),
        meta(7, dtype=torch.int64)), False),
    "latent_write": ("latent_write", lambda d: (
        meta(7, 512, dtype=d), meta(7, 64, dtype=d), meta(9, 64, 576, dtype=d),
        meta(7, dtype=torch.int64)), False),
}
DOTS = {"paged_attention", "paged_latent_attention", "group_matmul"}
QUICK = {("decode", 80), ("decode", 90), ("extend", 90), ("latent-16-heads", 90),
         ("few-rows", 80), ("many-rows", 90), ("combine", 90), ("group", 90), ("kv_write", 90),
         ("latent_write", 90)}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Launch]:
    """(kernel, arguments, options) of what would be launched; nothing compiled is kept."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(0 < n < 2**31 for n in grid) and all(n < 2**16 for n in grid[1:])
            return lambda *args, **options: found.append((self.kernel, args, options))

    for module in {*MODULES.values(), "softmax"}:
        monkeypatch.setattr(f"xllm.kernels.triton.{module}.wrap_triton", Recorder)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return found


def compile_launch(launch: Launch, capability: int) -> object:
    """Machine code of a launch, specialised as a launch on the device would be."""
    kernel, args, options = launch
    kinds, constants, aligned = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        name = parameter.name
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            kinds[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            kinds[name] = "fp32"
        else:
            kinds[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, kinds, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_machine_code(launches: list[Launch], case: str, capability: int,
                       dtype: torch.dtype) -> None:
    """Every launch compiles, fits the device, and multiplies in tensor cores where it should."""
    name, arguments, wide = CASES[case]
    getattr(import_module(f"xllm.kernels.triton.{MODULES[name]}"), name)(*arguments(dtype))
    assert launches
    compiled = [compile_launch(launch, capability) for launch in launches]
    for one in compiled:
        assert len(one.asm["cubin"]) > 1000
        assert one.metadata.shared <= SHARED_BYTES[capability]
    if name in DOTS and dtype != torch.float32:
        wanted = "wgmma.mma_async" if wide and capability == 90 else "mma.sync"
        assert wanted in compiled[0].asm["ptx"]


@pytest.mark.parametrize(("case", "capability"), sorted(QUICK))
def test_machine_code(launches: list[Launch], case: str, capability: int) -> None:
    check_machine_code(launches, case, capability, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CASES)
def test_all_machine_code(launches: list[Launch], case: str, capability: int,
                          dtype: torch.dtype) -> None:
    check_machine_code(launches, case, capability, dtype)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_schemas_are_the_ops(name: str) -> None:
    def plain(op: torch._ops.OpOverload) -> list[tuple]:
        return [(a.name, str(a.type), a.default_value, bool(a.alias_info and a.alias_info.is_write))
                for a in op._schema.arguments]

    ours, op = triton_ops()[name], REGISTRY[name].overload
    assert plain(ours) == plain(op)
    assert [str(r.type) for r in ours._schema.returns] == [str(r.type) for r in op._schema.returns]


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that only says what the device is; torch asks it when it analyses kernels."""
    class Driver:
        def get_current_target(self) -> object:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


class Traced(Exception):
    """Carries the graph out of the compiler."""


def functional_graph(function: Callable[..., object], args: tuple, dynamic: bool) -> fx.Graph:
    """The graph that Inductor would get."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, example: list[Tensor]) -> None:
        graphs.append(gm.graph)
        raise Traced

    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="Traced"):
        torch.compile(function, backend=aot_autograd(fw_compiler=keep), dynamic=dynamic,
                      fullgraph=True)(*args)
    return graphs[0]


WRITTEN = {  # tensors that the kernels of an op write: all others are only read
    "paged_attention": {"out", "sums"}, "paged_latent_attention": {"out", "sums"},
    "kv_write": {"cache"}, "latent_write": {"cache"}, "group_matmul": {"out"},
    "combine_experts": {"out"}, "group_tokens": {"rows", "places", "offsets"},
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", sorted(MODULES))
def test_inductor_sees_the_launches(h100: None, name: str, dynamic: bool) -> None:
    """Ops become launches, with one graph for all sizes, and no cache is thought to be written."""
    case = {"paged_attention": "extend", "paged_latent_attention": "latent-16-heads",
            "group_matmul": "some-rows"}.get(name)
    chosen = next(c for key, c in CASES.items() if c[0] == name and case in (None, key))
    args = tuple(torch.empty_like(a, device="cpu") if isinstance(a, Tensor) else a
                 for a in chosen[1](torch.bfloat16))
    op = triton_ops()[name]
    graph = functional_graph(lambda *a: op(*a), args, dynamic)
    found = [n for n in graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert found and not any("xllm" in str(n.target) for n in graph.nodes)
    assert set().union(*(n.kwargs["tensors_to_clone"] for n in found)) <= WRITTEN[name]
    if dynamic:
        symbols = [d for n in found for d in n.kwargs["grid"][0] if isinstance(d, fx.Node)]
        assert symbols or name == "group_tokens"  # whose grid is the number of experts


def run_values(examples: int) -> None:
    """``test_triton_values.py`` where Triton interprets its kernels."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("older interpreters cannot loop over computed ranges with NumPy 2")
    file = Path(__file__).with_name("test_triton_values.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                          "XLLM_TRITON_EXAMPLES": str(examples)},
        cwd=file.parents[2], capture_output=True, text=True, check=False)
    last = (done.stdout.splitlines() or [done.stderr])[-1]
    assert done.returncode == 0 and "skipped" not in last, done.stdout[-4000:] + done.stderr


def test_values() -> None:
    run_values(1)


@pytest.mark.slow
def test_more_values() -> None:
    run_values(60)
