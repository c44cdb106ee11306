"""Capture: an unmodified ``transformers`` model becomes an FX graph, on the meta device.

No weights are read. Tokens are flattened to ``[1, T]`` with T symbolic from 1; attention appears
as one ``xllm.attention`` node per layer because ``transformers`` lets us say so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from xllm.compiler import interfaces
from xllm.errors import UserError
from xllm.graph import INPUT_DIMS, INPUT_DTYPES, SYMBOLS, Call, Constant, Input, Program, Weight
from xllm.passes.core import ModelFacts
from xllm.weights import Leaf

#: Those whose frequencies are constants; longrope and dynamic choose them by the longest sequence
#: of a batch, so that one request would change another's tokens.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SAMPLE = {"T": 7, "S": 3, "M": 5, "R": 4, "P": 11, "S+1": 4}


class CaptureError(UserError, ValueError):
    """A model that cannot be captured; names the module and what is supported."""


class _Flat(nn.Module):
    """The model with the engine's inputs; the paged ones stay unused until page_attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor, slot_mapping: Tensor,
                block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
                logits_rows: Tensor, pages: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits


@dataclass
class _Where:
    """Innermost module that was running, for error messages."""

    path: list[str]

    def attach(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            label = f"{name or 'model'} ({type(module).__name__})"
            module.register_forward_pre_hook(lambda *_, label=label: self.path.append(label))
            module.register_forward_hook(lambda *_: self.path.pop() and None)


def build_meta_model(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, with rotary frequencies real; raises :class:`CaptureError`."""
    kind = config.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CaptureError(f"config.json: model_type {kind!r} is no causal language model that "
                           "transformers knows")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise CaptureError(f"config.json: rope_type {rope!r} is not supported; "
                           f"supported: {', '.join(ROPE_TYPES)}")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=interfaces.NAME,
                experts_implementation=interfaces.NAME)
    except Exception as error:
        raise CaptureError(f"config.json: {kind} cannot be built from it: "
                           f"{type(error).__name__}: {error}") from error
    model.eval()
    interfaces.prepare_experts(model)
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:  # lost on meta: make the owning module again
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config))
    return model


def facts_of(model: nn.Module, config: PretrainedConfig) -> ModelFacts:
    """What the module tree and configuration say, for the passes' expected counts."""
    children = {name: dict(module.named_children()) for name, module in model.named_modules()}
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    return ModelFacts(
        architecture=type(model).__name__,
        num_layers=config.num_hidden_layers,
        num_norms=len(norms),
        num_gated_mlps=sum({"gate_proj", "up_proj"} <= c.keys() for c in children.values()),
        num_qkv=sum({"q_proj", "k_proj", "v_proj"} <= c.keys() for c in children.values()),
        qk_norm=any("q_norm" in c for c in children.values()),
        tied_embeddings=bool(config.tie_word_embeddings),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        num_even_linears=sum(isinstance(m, nn.Linear) and m.in_features % 2 == 0
                             for m in model.modules()),
    )


def capture(config: PretrainedConfig, dtype: torch.dtype) -> tuple[Program, ModelFacts]:
    """Export the model of ``config``; one piece ``model``, level *captured*."""
    model = build_meta_model(config, dtype)
    facts = facts_of(model, config)
    exported = _export(model)
    gm = exported.graph_module
    fake_mode = next(n.meta["val"].fake_mode for n in gm.graph.nodes if n.name == "input_ids")
    constants = {name.removeprefix("model."): tensor
                 for name, tensor in {**exported.constants, **exported.state_dict}.items()
                 if not tensor.is_meta}
    inputs = _bind(gm, exported, fake_mode, tied_name(model))
    plain = fx.GraphModule(nn.Module(), gm.graph)
    program = Program({"model": plain}, [Call("model")], inputs, constants, fake_mode)
    used = {n.meta["bind"].name for n in plain.graph.nodes if n.op == "placeholder"
            and isinstance(n.meta["bind"], Constant)}
    program.constants = {k: v for k, v in constants.items() if k in used}
    leaves = {leaf: leaf for n in plain.graph.nodes if n.op == "placeholder"
              and isinstance(n.meta["bind"], Weight) for leaf in [n.meta["bind"].recipe.name]}
    program.schedule = [Call("model", leaves=leaves)]
    return program, facts


def tied_name(model: nn.Module) -> dict[str, str]:
    """Parameters that share another's tensor, by the name under which it is stored."""
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    return dict(tied)


def _export(model: nn.Module) -> torch.export.ExportedProgram:
    dims = {name: torch.export.Dim("dim_" + name, min=1, max=1 << 20) for name in SYMBOLS}
    dims["S+1"] = dims["S"] + 1
    shapes = {**INPUT_DIMS, "pages": ("P",)}
    args = {
        name: torch.zeros([SAMPLE.get(d, d) for d in shape], device="meta",
                          dtype=INPUT_DTYPES.get(name, torch.int64))
        for name, shape in shapes.items()
    }
    dynamic = {name: {i: dims[d] for i, d in enumerate(shape) if d != 1}
               for name, shape in shapes.items()}
    where = _Where([])
    where.attach(model)
    try:
        with torch.no_grad():
            return torch.export.export(_Flat(model), (), args, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        module = where.path[-1] if where.path else type(model).__name__
        reason = str(error).strip().splitlines()[0]
        raise CaptureError(f"{type(model).__name__}: module {module} cannot be captured: {reason}"
                           ) from error


def _bind(gm: fx.GraphModule, exported: torch.export.ExportedProgram, fake_mode: object,
          tied: dict[str, str]) -> dict[str, Tensor]:
    """Give every placeholder its binding; drop the unused ones but keep the inputs' fakes."""
    kinds = torch.export.graph_signature.InputKind
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    inputs = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind is kinds.USER_INPUT:
            inputs[node.name] = node.meta["val"]
            node.meta["bind"] = Input(node.name)
        elif spec.kind is kinds.PARAMETER:
            name = spec.target.removeprefix("model.")
            node.meta["bind"] = Weight(Leaf(tied.get(name, name)))
        else:
            node.meta["bind"] = Constant(spec.target.removeprefix("model."))
            val = node.meta["val"]
            with fake_mode:
                node.meta["val"] = torch.empty(val.shape, dtype=val.dtype, device="meta")
        if not node.users:
            gm.graph.erase_node(node)
    return inputs
