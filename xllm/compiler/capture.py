"""Capture: an unmodified ``transformers`` model becomes an FX graph, on the meta device.

No weights are read. Tokens are flattened to ``[1, T]`` with T symbolic from 1; attention appears
as one ``xllm.attention`` node per layer because ``transformers`` lets us say so.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from xllm.compiler import interfaces
from xllm.compiler.capture_vision import EncodeGraph, TextGraph
from xllm.compiler.facts import facts_of
from xllm.compiler.observe import Observer, observed
from xllm.compiler.sources import keep_float32
from xllm.errors import UserError
from xllm.graph import INPUT_DIMS, INPUT_DTYPES, SYMBOLS, Call, Constant, Input, Program, Weight
from xllm.passes.core import ModelFacts
from xllm.vision import FAMILIES, sees_images
from xllm.weights import Leaf

#: Those whose frequencies are constants; longrope and dynamic choose them by the longest sequence
#: of a batch, so that one request would change another's tokens.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
#: Model types that are a language model and more, around it.
IMAGE_MODELS = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
                - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())
SAMPLE = {"T": 7, "S": 3, "M": 5, "R": 4, "P": 11, "S+1": 4}


class CaptureError(UserError, ValueError):
    """A model that cannot be captured; names the module and what is supported."""


class _Flat(nn.Module):
    """The model with the engine's inputs; the paged ones stay unused until page_attention."""

    DIMS = INPUT_DIMS | {"pages": ("P",)}
    RESULT = "logits"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config.get_text_config()
        self.sizes: dict[str, int] = {}

    def forward(self, input_ids: Tensor, positions: Tensor, slot_mapping: Tensor,
                block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
                logits_rows: Tensor, pages: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits


def rope_types(config: PretrainedConfig) -> list[str]:
    """Kinds of rotary embedding that a configuration names, one per type of layer."""
    parameters = config.to_dict().get("rope_parameters") or {}
    by_layer = [p for p in parameters.values() if isinstance(p, dict)]
    return [p.get("rope_type", "default") for p in by_layer or [parameters]]


def build_meta_model(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, with rotary frequencies real; raises :class:`CaptureError`."""
    kind = config.model_type
    auto = AutoModelForImageTextToText if kind in IMAGE_MODELS else AutoModelForCausalLM
    remote = not type(config).__module__.startswith("transformers.")  # loaded if trusted only
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | IMAGE_MODELS and not remote:
        raise CaptureError(f"config.json: model_type {kind!r} is no causal language model that "
                           "transformers knows")
    for rope in rope_types(config.get_text_config()):
        if rope not in ROPE_TYPES:
            raise CaptureError(f"config.json: rope_type {rope!r} is not supported; "
                               f"supported: {', '.join(ROPE_TYPES)}")
    try:
        with torch.device("meta"):
            model = auto.from_config(
                config, dtype=dtype, attn_implementation=interfaces.NAME,
                experts_implementation=interfaces.NAME, trust_remote_code=remote)
    except KeyError as error:  # of a table of attention classes
        raise CaptureError(f"config.json: {kind} is not supported: its code does not let its "
                           f"attention be replaced (KeyError {error})") from error
    except Exception as error:
        raise CaptureError(f"config.json: {kind} cannot be built from it: "
                           f"{type(error).__name__}: {error}") from error
    model.eval()
    keep_float32(model, dtype)
    interfaces.prepare_experts(model)
    _restore_buffers(model)
    return model


def _restore_buffers(model: nn.Module) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies, embedding scales)."""
    for module in model.modules():
        lost = {name: b for name, b in module.named_buffers(recurse=False)
                if name in module._non_persistent_buffers_set}
        for name, buffer in lost.items():
            empty = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
            module.register_buffer(name, empty, persistent=False)
        if lost:
            with torch.no_grad():
                model._init_weights(module)


def capture(config: PretrainedConfig, dtype: torch.dtype) -> tuple[Program, ModelFacts]:
    """Export the model of ``config``; one piece ``model``, level *captured*.

    Of a model that sees images, the language model; :func:`capture_encoder` has the rest.
    """
    model = build_meta_model(config, dtype)
    if config.model_type not in IMAGE_MODELS:
        return _capture(_Flat(model), dtype)
    text = _capture(TextGraph(model), dtype)  # if this fails, it is the module that matters most
    if not sees_images(config):
        raise CaptureError(f"config.json: the vision part of model_type {config.model_type!r} is "
                           f"not supported; model types whose is: {', '.join(FAMILIES)}")
    return text


def capture_encoder(config: PretrainedConfig, dtype: torch.dtype) -> tuple[Program, ModelFacts]:
    """The encode graph of a model that sees images, as :func:`capture`."""
    return _capture(EncodeGraph(build_meta_model(copy.deepcopy(config), dtype)), dtype)


def _capture(entry: _Flat | TextGraph | EncodeGraph,
             dtype: torch.dtype) -> tuple[Program, ModelFacts]:
    model = entry.model
    exported, observer = _export(entry, dtype)
    try:
        facts = facts_of(model, entry.config, observer)
    except AttributeError as error:
        raise CaptureError(f"config.json of {type(model).__name__}: {error}") from error
    gm = exported.graph_module
    fake_mode = next(iter(gm.graph.nodes)).meta["val"].fake_mode
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
    program.schedule = [Call("model", leaves=leaves, outputs=(entry.RESULT,))]
    return program, facts


def tied_name(model: nn.Module) -> dict[str, str]:
    """Parameters that share another's tensor, by the name under which it is stored."""
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    return dict(tied)


def _export(entry: _Flat | TextGraph | EncodeGraph,
            dtype: torch.dtype) -> tuple[torch.export.ExportedProgram, Observer]:
    model, sizes = entry.model, SAMPLE | entry.sizes
    dims = {name: torch.export.Dim("dim_" + name, min=1, max=1 << 20) for name in SYMBOLS}
    dims["S+1"] = dims["S"] + 1
    if "patches" in sizes:
        dims["patches"] = sizes["patches"] // sizes["U"] * dims["U"]
    dtypes = INPUT_DTYPES | {"pages": torch.int64, "image_embeds": dtype}
    args = {
        name: torch.zeros([sizes.get(d, d) for d in shape], device="meta", dtype=dtypes[name])
        for name, shape in entry.DIMS.items()
    }
    dynamic = {name: {i: dims[d] for i, d in enumerate(shape) if d in dims}
               for name, shape in entry.DIMS.items()}
    interfaces.MASKS.start()
    with observed(model) as observer:
        try:
            with torch.no_grad():
                exported = torch.export.export(entry, (), args, dynamic_shapes=dynamic,
                                               strict=False)
            interfaces.MASKS.check()
            return exported, observer
        except Exception as error:
            raise CaptureError(_why(model, observer, error)) from error


def _why(model: nn.Module, observer: Observer, error: Exception) -> str:
    """One line: the module that cannot be captured, and the reason."""
    reason = str(error).strip().splitlines()[0]
    if "Constraints violated" in reason and observer.guards:
        return (f"{type(model).__name__}: module {observer.guards[0]} cannot be captured: its code "
                "depends on the number of tokens (chunked or recurrent attention)")
    return f"{type(model).__name__}: module {observer.where()} cannot be captured: {reason}"


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
        elif spec.kind is kinds.PARAMETER or (spec.kind is kinds.BUFFER and spec.persistent):
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
