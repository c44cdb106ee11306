"""Run xllm ops by their references, whatever kernels other tests of the process have loaded."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

from xllm.ops import REGISTRY


class References(TorchDispatchMode):
    """Inside this context every ``torch.ops.xllm`` call is its op's meaning."""

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func.namespace == "xllm":
            return REGISTRY[func._schema.name.removeprefix("xllm::")].reference(
                *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
