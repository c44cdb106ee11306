"""Compiling the CPU kernels: choice of instruction set and clear failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm.kernels import CPU_SOURCES, build


def test_every_kernel_names_a_source() -> None:
    names = {path.name for path in build.sources()}
    assert set(CPU_SOURCES.values()) <= names


BF16 = "avx2 fma avx512f avx512bw avx512dq avx512vl avx512_bf16"


@pytest.mark.parametrize(("vendor", "flags", "isa"), [
    ("AuthenticAMD", BF16, "avx512_bf16"),
    ("GenuineIntel", BF16, "avx512"),
    ("AuthenticAMD", BF16.replace("avx512_bf16", ""), "avx512"),
    ("GenuineIntel", "avx2 fma sse4_2", "avx2"),
    ("GenuineIntel", "avx2", "portable"),
])
def test_detect_isa(tmp_path: Path, vendor: str, flags: str, isa: str) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n")
    assert build.detect_isa(info) == isa


def test_detect_isa_without_cpuinfo(tmp_path: Path) -> None:
    assert build.detect_isa(tmp_path / "none") == "portable"


def test_unknown_isa_names_the_known() -> None:
    with pytest.raises(ValueError, match="avx1024.*avx512_bf16.*portable"):
        build.isa_flags("avx1024")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.CompilerMissing, match=r"\$CXX, g\+\+, c\+\+, clang\+\+"):
        build.compile_cpu("portable", tmp_path / "kernels.so")


def test_first_error_is_the_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.cpp").write_text("int f() { return undeclared; }\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    with pytest.raises(build.CompileFailed, match="broken.cpp:1.*undeclared"):
        build.compile_cpu("portable", tmp_path / "kernels.so")
    assert not (tmp_path / "kernels.so").exists()


def test_hash_follows_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("int a;\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    before = build.sources_hash()
    assert before == build.sources_hash()
    (tmp_path / "a.cpp").write_text("int b;\n")
    assert before != build.sources_hash()
