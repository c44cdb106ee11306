"""xLLM: a compiler-centric LLM inference engine.

``from xllm import LLM, SamplingParams`` gives the in-process API.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> object:
    """Import the API on first use, so that ``import xllm`` stays light."""
    if name in __all__:
        from xllm import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'xllm' has no attribute {name!r}")
