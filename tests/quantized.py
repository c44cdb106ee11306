"""Weights quantised and written in the layouts of published checkpoints, as their tools write them.

A style turns a weight ``[N, K]`` into stored tensors and says which weight they stand for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Style:
    """``config`` is the quantization_config; ``encode`` returns (tensors, the weight they hold)."""

    config: dict
    encode: Callable[[Tensor], tuple[Stored, Tensor]]
    format: str  # of the weight in memory, as xllm.quantization.Format prints it


def words(numbers: Tensor, bits: int, dim: int, order: tuple[int, ...]) -> Tensor:
    """Unsigned numbers ``[A, B]`` in int32 words along ``dim``: field i holds number order[i]."""
    fields = 32 // bits
    pad = -numbers.shape[dim] % fields
    padded = torch.nn.functional.pad(numbers, (0, 0, 0, pad) if dim == 0 else (0, pad))
    split = padded.long().unflatten(dim, (-1, fields))
    total = sum(split.select(dim + 1, order[i]) << (bits * i) for i in range(fields))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


def grids(weight: Tensor, group: int, levels: int, zeros: bool, dtype: torch.dtype
          ) -> tuple[Tensor, Tensor]:
    """Scales ``[N, G]`` of a dtype, and zero points among ``levels`` unsigned numbers."""
    blocks = weight.unflatten(1, (-1, group))
    low, high = blocks.amin(-1), blocks.amax(-1)
    if not zeros:
        scales = (blocks.abs().amax(-1) / (levels / 2 - 1)).to(dtype)
        return scales, torch.full(scales.shape, levels // 2)
    scales = ((high - low) / (levels - 1)).to(dtype)
    return scales, (-low / scales.float()).round().clamp(0, levels - 1).long()


def numbers(weight: Tensor, scales: Tensor, zeros: Tensor, levels: int, index: Tensor
            ) -> tuple[Tensor, Tensor]:
    """Unsigned numbers ``[N, K]`` and the weight that they stand for; ``index`` ``[K]``: groups."""
    scale, zero = scales.float()[:, index], zeros[:, index]
    q = (weight / scale + zero).round().clamp(0, levels - 1).long()
    return q, (q - zero).float() * scale


def fp8_blocks(weight: Tensor) -> tuple[Stored, Tensor]:
    """One float32 scale per block of 16 x 16, edges cut."""
    rows, width = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -width % GROUP, 0, -rows % GROUP))
    blocks = padded.unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))
    scales = blocks.abs().amax((1, 3)) / 448
    full = scales.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)[:rows, :width]
    codes = (weight / full).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * full


def fp8_tensor(weight: Tensor) -> tuple[Stored, Tensor]:
    """One scale for all, and the range of the activations."""
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale_inv": scale, "activation_scale": torch.tensor(1.0)}
    return stored, codes.float() * scale


def int_quantized(zeros: bool) -> Callable[[Tensor], tuple[Stored, Tensor]]:
    """compressed-tensors w8a8: int8 codes, a bfloat16 scale per output channel."""

    def encode(weight: Tensor) -> tuple[Stored, Tensor]:
        scales, zero = grids(weight, weight.shape[1], 256, zeros, torch.bfloat16)
        index = torch.zeros(weight.shape[1], dtype=torch.long)
        q, made = numbers(weight, scales, zero, 256, index)
        stored = {"weight": (q - 128).to(torch.int8), "weight_scale": scales}
        if zeros:
            stored["weight_zero_point"] = (zero - 128).to(torch.int8)
        return stored, made

    return encode


def pack_quantized(bits: int, zeros: bool) -> Callable[[Tensor], tuple[Stored, Tensor]]:
    """compressed-tensors w4a16 and w8a16: words along the inputs, zero points along outputs."""

    def encode(weight: Tensor) -> tuple[Stored, Tensor]:
        scales, zero = grids(weight, GROUP, 1 << bits, zeros, torch.bfloat16)
        q, made = numbers(weight, scales, zero, 1 << bits,
                          torch.arange(weight.shape[1]) // GROUP)
        stored = {"weight_packed": words(q, bits, 1, range(32 // bits)), "weight_scale": scales,
                  "weight_shape": torch.tensor(weight.shape)}
        if zeros:
            stored["weight_zero_point"] = words(zero, bits, 0, range(32 // bits))
        return stored, made

    return encode


def gptq(bits: int, symmetric: bool, act_order: bool, version: int
         ) -> Callable[[Tensor], tuple[Stored, Tensor]]:
    """Words along the inputs of the transposed weight; the first version stores zero - 1."""

    def encode(weight: Tensor) -> tuple[Stored, Tensor]:
        fields, width = 32 // bits, weight.shape[1]
        index = torch.arange(width) // GROUP
        if act_order:
            index = index[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
        ordered = weight[:, index.argsort(stable=True)]
        scales, zero = grids(ordered, GROUP, 1 << bits, not symmetric, torch.float16)
        zero = zero.clamp(min=1)  # the first version cannot store 0
        q, made = numbers(weight, scales, zero, 1 << bits, index)
        return {"qweight": words(q.T, bits, 0, range(fields)),
                "qzeros": words(zero.T - int(version == 1), bits, 1, range(fields)),
                "scales": scales.T.contiguous(), "g_idx": index.int()}, made

    return encode


def awq(weight: Tensor) -> tuple[Stored, Tensor]:
    """Words along the outputs of the transposed weight, even outputs before odd ones."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    scales, zero = grids(weight, GROUP, 16, True, torch.float16)
    q, made = numbers(weight, scales, zero, 16, torch.arange(weight.shape[1]) // GROUP)
    return {"qweight": words(q.T, 4, 1, order), "qzeros": words(zero.T, 4, 1, order),
            "scales": scales.T.contiguous()}, made


def _ct(format: str, bits: int, kind: str = "int", **weights: object) -> dict:
    args = {"num_bits": bits, "type": kind, "symmetric": True} | weights
    return {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}


def _gptq(bits: int, sym: bool, desc_act: bool, version: str) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": sym,
            "desc_act": desc_act, "checkpoint_format": version}


_GROUPED = {"strategy": "group", "group_size": GROUP}
_EACH = f"{GROUP} inputs per scale"
STYLES = {
    "fp8": Style({"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}, fp8_blocks,
                 f"fp8, {_EACH}"),
    "fp8-tensor": Style({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor,
                        "fp8, 32 inputs per scale"),
    "w8a8": Style(_ct("int-quantized", 8, strategy="channel"), int_quantized(False),
                  "int8, 32 inputs per scale"),
    "w8a8-zeros": Style(_ct("int-quantized", 8, strategy="channel", symmetric=False),
                        int_quantized(True), "int8, 32 inputs per scale with zero points"),
    "w4a16": Style(_ct("pack-quantized", 4, **_GROUPED), pack_quantized(4, False),
                   f"int4, {_EACH}"),
    "w4a16-zeros": Style(_ct("pack-quantized", 4, symmetric=False, **_GROUPED),
                         pack_quantized(4, True), f"int4, {_EACH} with zero points"),
    "w8a16": Style(_ct("pack-quantized", 8, **_GROUPED), pack_quantized(8, False),
                   f"int8, {_EACH}"),
    "gptq": Style(_gptq(4, True, False, "gptq"), gptq(4, True, False, 1), f"int4, {_EACH}"),
    "gptq-zeros": Style(_gptq(4, False, False, "gptq"), gptq(4, False, False, 1),
                        f"int4, {_EACH} with zero points"),
    "gptq-v2": Style(_gptq(4, False, False, "gptq_v2"), gptq(4, False, False, 2),
                     f"int4, {_EACH} with zero points"),
    "gptq-8": Style(_gptq(8, False, False, "gptq"), gptq(8, False, False, 1),
                    f"int8, {_EACH} with zero points"),
    "gptq-act-order": Style(_gptq(4, True, True, "gptq"), gptq(4, True, True, 1), "None"),
    "awq": Style({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm",
                  "zero_point": True}, awq, f"int4, {_EACH} with zero points"),
}
PROJECTIONS = r".*_proj\.weight"


def quantize_checkpoint(source: Path, style: Style, quantised: Path, plain: Path,
                        which: str = PROJECTIONS) -> None:
    """Write a checkpoint with some weights in a style, and one that holds what they stand for."""
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    stored, made = {}, {}
    for name, tensor in tensors.items():
        if re.fullmatch(which, name):
            own, made[name] = style.encode(tensor.float())
            stored |= {name.removesuffix("weight") + last: t.contiguous()
                       for last, t in own.items()}
        else:
            stored[name] = made[name] = tensor
    for path, content, extra in ((quantised, stored, {"quantization_config": style.config}),
                                 (plain, made, {})):
        path.mkdir()
        save_file(content, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config | extra))
