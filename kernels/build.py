"""Compile the CPU kernels into one shared library for a named instruction set.

Flags are explicit per instruction set, never ``-march=native``: what a library needs of a machine
is then known from its name. ``torch.ops.load_library`` loads the result; torch's own libraries
resolve by name because they are in the process already.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).parent / "cpu"
COMPILERS = ("g++", "c++", "clang++")
CPUINFO = Path("/proc/cpuinfo")

AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
AVX512_FEATURES = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"})
# Compiler flags by instruction set, best first.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*AVX512_FLAGS, "-mavx512bf16"),
    "avx512": AVX512_FLAGS,
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
# What /proc/cpuinfo must list.
ISA_FEATURES: dict[str, frozenset[str]] = {
    "avx512_bf16": AVX512_FEATURES | {"avx512_bf16"},
    "avx512": AVX512_FEATURES,
    "avx2": frozenset({"avx2", "fma"}),
    "portable": frozenset(),
}
COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden")


class CompilerMissing(RuntimeError):
    """No C++ compiler was found."""


class CompileFailed(RuntimeError):
    """The compiler refused a source; the message is its first error."""


def cpu_features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Feature names and vendor of the first processor; empty where the file is missing."""
    words: set[str] = set()
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "vendor_id"):
            words.update(value.split())
    return frozenset(words)


def runs_on(isa: str, features: frozenset[str]) -> bool:
    """Whether a machine of these features can execute a library built for ``isa``."""
    return ISA_FEATURES[isa] <= features


def detect_isa(cpuinfo: Path = CPUINFO) -> str:
    """The instruction set of :data:`ISA_FLAGS` that is fastest on this machine.

    On Intel cores a bfloat16 dot product takes the time of four float32 FMAs and does the work of
    two (measured: 1.4 against 6 per ns), so the plain AVX-512 kernels win there.
    """
    features = cpu_features(cpuinfo)
    slow = {"avx512_bf16"} if "GenuineIntel" in features else set()
    return next(isa for isa in ISA_FLAGS if isa not in slow and runs_on(isa, features))


def isa_flags(isa: str) -> tuple[str, ...]:
    """Compiler flags of an instruction set; ``ValueError`` names the known ones."""
    if isa not in ISA_FLAGS:
        raise ValueError(f"unknown instruction set {isa!r}; known: {', '.join(ISA_FLAGS)}")
    return ISA_FLAGS[isa]


def sources() -> list[Path]:
    """All C++ sources and headers, by name."""
    return sorted(path for path in SOURCE_DIR.iterdir() if path.suffix in (".cpp", ".h"))


def sources_hash() -> str:
    """SHA-256 over sources and flags: what a compiled library depends on in this package."""
    digest = hashlib.sha256(repr((COMMON_FLAGS, ISA_FLAGS)).encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def find_compiler() -> str:
    """``$CXX``, or the first of g++, c++ and clang++ on the path."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if name and shutil.which(name.split()[0]):
            return name
    raise CompilerMissing(f"no C++ compiler: looked for $CXX, {', '.join(COMPILERS)}")


def compile_cpu(isa: str, out: Path) -> None:
    """Build every kernel for ``isa`` into the shared library ``out``, sources in parallel."""
    compiler = find_compiler().split()
    root = Path(torch.__file__).parent
    flags = [*COMMON_FLAGS, *isa_flags(isa), f"-I{root / 'include'}"]
    units = [path for path in sources() if path.suffix == ".cpp"]
    units.sort(key=lambda path: not path.name.startswith("bindings"))  # the slowest first
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch) / f"{path.stem}.o" for path in units]

        def compile_unit(source: Path, target: Path) -> None:
            _run([*compiler, *flags, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
            list(pool.map(compile_unit, units, objects))
        out.parent.mkdir(parents=True, exist_ok=True)
        linked = Path(scratch) / "kernels.so"
        libraries = ["-L" + str(root / "lib"), "-ltorch_cpu", "-lc10"]
        _run([*compiler, "-shared", "-fopenmp", "-o", str(linked), *map(str, objects), *libraries])
        _move(linked, out)


def _move(source: Path, target: Path) -> None:
    """Replace ``target`` at once, so that no process sees half a library."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, beside)
    beside.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error: " in line), (lines or ["no output"])[0])
        raise CompileFailed(f"{command[0]} failed: {first}")


