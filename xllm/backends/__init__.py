"""Backends by name."""

from __future__ import annotations

from xllm.backends.base import Backend, BackendError, BuildOptions, Compiled
from xllm.backends.eager import EagerBackend
from xllm.backends.inductor import InductorBackend

BACKENDS: dict[str, Backend] = {b.name: b for b in (EagerBackend(), InductorBackend())}


def find_backend(name: str) -> Backend:
    """The backend called ``name``; raises :class:`BackendError` that names the alternatives."""
    if name not in BACKENDS:
        raise BackendError(f"--backend is {name!r}; accepted: {', '.join(BACKENDS)}")
    return BACKENDS[name]


__all__ = ["BACKENDS", "Backend", "BackendError", "BuildOptions", "Compiled", "find_backend"]
