"""The facts by which passes are counted: from configuration, module tree and observed calls."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig

from xllm.compiler.observe import Linear, Observer
from xllm.ops.norm import rms_norm
from xllm.passes.core import ModelFacts

#: Norms of a decoder layer → how many of the model's norms read a residual sum, per layer. The
#: norm of the next layer, or the final one, counts for the layer before it.
_RESIDUAL_NORMS = {
    frozenset({"input_layernorm", "post_attention_layernorm"}): 2,
    frozenset({"input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm",
               "post_mlp_layernorm"}): 2,
    frozenset({"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
               "post_feedforward_layernorm"}): 2,
    frozenset({"norm1", "norm2"}): 2,
}
#: Those whose layers add the normed branch, so that only the final norm reads a sum.
_POST_NORMS = frozenset({"post_attention_layernorm", "post_feedforward_layernorm"})


def facts_of(model: nn.Module, config: PretrainedConfig, observer: Observer) -> ModelFacts:
    """What is known of ``model`` without looking at its graph; ``config`` is the text model's."""
    modules = dict(model.named_modules())
    children = {name: dict(module.named_children()) for name, module in modules.items()}
    norms = {name: norm_kind(type(m)) for name, m in modules.items()
             if "Norm" in type(m).__name__ and m._parameters.get("weight") is not None}
    latents = [name for name, inside in children.items()
               if {"kv_a_proj_with_mqa", "kv_b_proj"} <= inside.keys()]
    absorbed = {f"{name}.kv_b_proj" for name in latents}
    linears = [call for call in observer.linears if call.module not in absorbed]
    groups = _groups(linears, 2)
    halves = {r.module: r for r in observer.rotations if _rotates_halves(r.apply)}
    attentions = [name for name, inside in children.items()
                  if {"q_proj", "k_proj", "v_proj"} <= inside.keys() and observer.calls.get(name)]
    experts = [m for name, m in modules.items() if "xllm_gate" in vars(m)
               for _ in range(observer.calls.get(name, 0))]
    return ModelFacts(
        architecture=type(model).__name__,
        num_layers=config.num_hidden_layers,
        norms=tuple(name for name, kind in norms.items() if kind
                    for _ in range(observer.calls.get(name, 0))),
        num_residual_norms=_residual_norms(modules, children),
        num_gated_mlps=sum(observer.calls.get(name, 0) for name, m in modules.items()
                           if _is_silu(m) and _has_gate(children[name.rpartition(".")[0]])),
        num_moe_layers=len(experts),
        num_even_expert_weights=sum(width % 2 == 0 for m in experts for width in _widths(m)),
        num_latent_attentions=len(latents),
        num_rotations=2 * len(halves),
        num_fused_qkv=sum(_fusable(modules[name], halves[name].head_dim, norms, name)
                          for name in attentions if name in halves
                          and halves[name].table_dim == modules[name].head_dim),
        num_even_linears=sum(x.weight.shape[1] % 2 == 0 for x in linears),
        num_linear_groups=len(groups),
        num_grouped_linears=sum(len(group) for group in groups),
        tied_embeddings=bool(model.config.tie_word_embeddings),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        linears=tuple(tuple(f"{call.module}.weight" for call in group)
                      for group in _groups(linears, 1)),
    )


@functools.cache
def norm_kind(kind: type[nn.Module]) -> str | None:
    """How a norm rounds in bfloat16, found by running it on numbers.

    ``rounded``: the normalised value is rounded, then weighted (Llama); ``wide``: weighted in
    float32, then rounded (OLMo2); ``wide+1``: the same with 1 + weight (Gemma); ``centred``: of
    what is left when the mean is taken away (Cohere2); None: another, or torch's own.
    """
    if kind.__module__.startswith("torch."):
        return None
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (8, 1))
    with torch.device("cpu"), torch.no_grad():
        try:
            norm = kind(64, eps=1e-6).bfloat16()
            norm.weight.copy_(weight[0])
            made = norm(x)
        except (TypeError, AttributeError, RuntimeError):
            return None
    centred = x.float() - x.float().mean(-1, keepdim=True)
    wanted = {"rounded": rms_norm(x, weight[0], 1e-6),
              "wide": rms_norm(x, weight[0].float(), 1e-6),
              "wide+1": rms_norm(x, weight[0].float() + 1, 1e-6),
              "centred": rms_norm(centred, weight[0].float(), 1e-6).bfloat16()}
    return next((name for name, value in wanted.items() if torch.equal(made, value)), None)


def _is_silu(module: nn.Module) -> bool:
    return isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation"


def _has_gate(siblings: dict[str, nn.Module]) -> bool:
    return {"gate_proj", "up_proj"} <= siblings.keys() or "gate_up_proj" in siblings


def _widths(experts: nn.Module) -> list[int]:
    """Inputs of both projections of an experts module."""
    return [p.shape[1 if experts.is_transposed else 2]
            for p in (experts.gate_up_proj, experts.down_proj)]


def _groups(linears: list[Linear], least: int) -> list[list[Linear]]:
    """Linear layers that read the very same tensor with parameters of one type, ``least`` or more.
    """
    groups: dict[tuple, list[Linear]] = {}
    for call in linears:
        base = call.x if call.x._base is None else call.x._base
        key = (id(base), call.x.dim(), call.has_bias, call.weight.dtype)
        groups.setdefault(key, []).append(call)
    return [group for group in groups.values() if len(group) >= least]


def _residual_norms(modules: dict[str, nn.Module],
                    children: dict[str, dict[str, nn.Module]]) -> int | None:
    """Norms that read a residual sum; None where the layout is not one that the table knows."""
    layouts: Counter[frozenset[str]] = Counter()
    for name, module in modules.items():
        if name.rpartition(".")[2].isdigit() and type(module).__name__.endswith(
                ("Layer", "Block")):
            layouts[frozenset(n for n, m in children[name].items()
                              if "RMSNorm" in type(m).__name__)] += 1
    if set(layouts) == {_POST_NORMS}:
        return 1
    if not layouts or not set(layouts) <= _RESIDUAL_NORMS.keys():
        return None
    return sum(_RESIDUAL_NORMS[layout] * count for layout, count in layouts.items())


@functools.cache
def _rotates_halves(apply: Callable) -> bool:
    """Whether a model's rotary function, run on numbers, exchanges the halves of a head (and not
    its even and odd features)."""
    heads, table = torch.arange(4.0).view(1, 1, 1, 4), torch.ones(1, 1, 4)
    try:
        turned, _ = apply(heads, heads, 0 * table, table)
    except (RuntimeError, TypeError, IndexError):
        return False
    return turned.flatten().tolist() == [-2.0, -3.0, 0.0, 1.0]


def _fusable(attention: nn.Module, head_dim: int, norms: dict[str, str | None], name: str) -> bool:
    """Whether norm, rotary embedding and KV write of an attention are one op of ours: keys and
    values of one size, and a norm per head, that rounds before it weights, or none."""
    kinds = {norms.get(f"{name}.{n}") for n in ("q_norm", "k_norm") if f"{name}.{n}" in norms}
    sizes = {getattr(attention, n).weight.shape[0] for n in ("q_norm", "k_norm") if kinds}
    same = attention.k_proj.weight.shape[0] == attention.v_proj.weight.shape[0]
    wide = attention.k_proj.weight.dtype == torch.float32
    return same and sizes <= {head_dim} and (kinds <= {"rounded"} or (wide and None not in kinds))
