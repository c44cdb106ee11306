"""The vocabulary ``torch.ops.xllm``: each op's schema, meaning, fake, sample inputs and cost."""

from xllm.ops import (
    activation,
    attention,
    group_matmul,
    latent,
    linear,
    moe,
    moe_route,
    norm,
    quant_linear,
    rope,
    vision,
)
from xllm.ops.core import REGISTRY, Cost, Op, Tolerance

__all__ = [
    "REGISTRY", "Cost", "Op", "Tolerance", "activation", "attention", "group_matmul", "latent",
    "linear", "moe", "moe_route", "norm", "quant_linear", "rope", "vision",
]
