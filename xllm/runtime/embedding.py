"""From a hidden state to an embedding, as the checkpoint's ``sentence-transformers`` files say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xllm.runtime.sampling_params import RequestError


@dataclass(frozen=True)
class Embedder:
    """Last-token pooling, then L2 normalisation or none; ``refusal`` says why there is neither."""

    normalize: bool = True
    refusal: str | None = None

    def check(self, dimensions: int | None) -> None:
        """Raise RequestError where the checkpoint wants what is not served, or no dimensions."""
        if self.refusal:
            raise RequestError(self.refusal, "model")
        if dimensions is not None and dimensions < 1:
            raise RequestError(f"dimensions is {dimensions}; accepted: 1 or more", "dimensions")

    def finish(self, hidden_H: Tensor, dimensions: int | None = None) -> Tensor:
        """The embedding, float32 ``[dimensions]``: cut to the first ones, then normalised."""
        size = len(hidden_H)
        if dimensions is not None and dimensions > size:
            raise RequestError(f"dimensions is {dimensions}; accepted: 1 to {size}", "dimensions")
        vector = hidden_H[:dimensions]
        return torch.nn.functional.normalize(vector, dim=0) if self.normalize else vector


def read_embedder(directory: Path) -> Embedder:
    """What ``modules.json`` and the pooling module's ``config.json`` ask for.

    A checkpoint without them is a plain language model: last token, normalised, as
    Qwen3-Embedding has it.
    """
    file = directory / "modules.json"
    if not file.is_file():
        return Embedder()
    try:
        modules = [(m["type"].rsplit(".", 1)[-1], m["path"])
                   for m in json.loads(file.read_text())]
        kinds = [kind for kind, _ in modules]
        others = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
        if others or kinds.count("Pooling") != 1:
            return Embedder(refusal=f"the model's modules.json lists {', '.join(kinds)}; served: "
                            "Transformer, Pooling, and perhaps Normalize")
        path = dict(modules)["Pooling"]
        mode = _pooling_mode(json.loads((directory / path / "config.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Embedder(refusal=f"the model's modules.json cannot be followed: {error!r}")
    if mode != "lasttoken":
        return Embedder(refusal=f"the model pools by {mode}; served: lasttoken")
    return Embedder("Normalize" in kinds)


def _pooling_mode(config: dict[str, object]) -> str:
    """``lasttoken``, ``cls``, ``mean`` ...; several are joined by ``+``."""
    if "pooling_mode" in config:
        return str(config["pooling_mode"])
    chosen = [name for name, value in config.items()
              if name.startswith("pooling_mode_") and value is True]
    return "+".join(name.removeprefix("pooling_mode_") for name in chosen) or "nothing"
