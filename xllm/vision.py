"""Models that see images: sizes, and what the host computes of the images' grids.

A grid is ``(t, h, w)``, in patches; ``merge x merge`` patches make one image token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

#: Model types whose images are served.
FAMILIES = ("qwen2_5_vl",)


def sees_images(config: PretrainedConfig) -> bool:
    """Whether the model takes images."""
    return config.model_type in FAMILIES


def patches_per_token(config: PretrainedConfig) -> int:
    """Patches that make one image token."""
    return config.vision_config.spatial_merge_size ** 2


def values_per_patch(config: PretrainedConfig) -> int:
    """Numbers of one patch: channels, frames, height and width."""
    vision = config.vision_config
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2


def image_tokens(config: PretrainedConfig, grids: Tensor) -> list[int]:
    """Image tokens of each grid ``[images, 3]``."""
    return (grids.prod(-1) // patches_per_token(config)).tolist()


def encode_inputs(config: PretrainedConfig, grids: Tensor) -> dict[str, Tensor]:
    """The encode graph's inputs besides the pixels, from grids ``[images, 3]``.

    See :data:`xllm.graph.ENCODE_DIMS`; the formulas are those of ``transformers``.
    """
    vision = config.vision_config
    merge = vision.spatial_merge_size
    window_index, cu_window_seqlens = get_vision_window_index(
        grids, merge, vision.window_size, vision.patch_size)
    return {
        "position_ids": get_vision_position_ids(grids, merge),
        "cu_seqlens": get_vision_cu_seqlens(grids),
        "window_index": window_index,
        "cu_window_seqlens": cu_window_seqlens.to(torch.int32),
    }
