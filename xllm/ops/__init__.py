"""The vocabulary ``torch.ops.xllm``: each op's schema, meaning, fake, sample inputs and cost."""

from xllm.ops import activation, attention, linear, moe, norm, rope
from xllm.ops.core import REGISTRY, Cost, Op, Tolerance

__all__ = [
    "REGISTRY", "Cost", "Op", "Tolerance", "activation", "attention", "linear", "moe",
    "norm", "rope",
]
