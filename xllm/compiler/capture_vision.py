"""The two graphs of a model that sees images: what of the model each runs, and with which inputs.

``text`` is the language model over token embeddings, some of them replaced by image embeddings;
``encode`` is the vision tower, from patches to image embeddings. ``transformers`` takes whatever
depends on the images' sizes (positions, segments, windows) as keyword inputs: nothing that depends
on data is left in the tower. Its attention over segments is one ``xllm.segment_attention`` node.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from xllm.graph import ENCODE_DIMS, IMAGE_DIMS, INPUT_DIMS
from xllm.vision import patches_per_token, values_per_patch

#: ``transformers`` hands the segments' bounds to implementations with "flash" in their names.
SEGMENTS = "xllm_flash_segments"
_SAMPLE = {"I": 6, "U": 9, "B": 3, "W": 5}


def _segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
    scaling: float, cu_seq_lens_q: Tensor, **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention that a vision tower calls during capture: ``[1, H, N, D]`` in, one node."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = torch.ops.xllm.segment_attention(q, k, v, cu_seq_lens_q, float(scaling))
    return out.unsqueeze(0), None


AttentionInterface.register(SEGMENTS, _segment_attention)


class TextGraph(nn.Module):
    """The language model; takes everything else out of ``model``."""

    DIMS = INPUT_DIMS | {"pages": ("P",)} | IMAGE_DIMS
    RESULT = "logits"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config.get_text_config()
        self.sizes = _SAMPLE | {"hidden": self.config.hidden_size}
        for name, _ in list(model.model.named_children()):
            if name != "language_model":
                setattr(model.model, name, None)

    def forward(self, input_ids: Tensor, positions: Tensor, slot_mapping: Tensor,
                block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
                logits_rows: Tensor, pages: Tensor, mrope_positions: Tensor, image_rows: Tensor,
                image_embeds: Tensor) -> Tensor:
        text = self.model.get_input_embeddings()(input_ids)
        rows = functional.embedding(image_rows.clamp(min=0), image_embeds).unsqueeze(0)
        seen = (image_rows >= 0).view(1, -1, 1)
        hidden = self.model.model.language_model(
            inputs_embeds=torch.where(seen, rows, text), position_ids=mrope_positions,
            use_cache=False).last_hidden_state
        return self.model.lm_head(hidden)


class EncodeGraph(nn.Module):
    """The vision tower; takes the language model out of ``model``."""

    DIMS = ENCODE_DIMS
    RESULT = "image_embeds"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        vision = model.config.vision_config
        vision._attn_implementation = SEGMENTS
        self.config = SimpleNamespace(
            num_hidden_layers=vision.depth, hidden_size=vision.hidden_size,
            vocab_size=0, max_position_embeddings=0)  # a tower has neither
        tokens = _SAMPLE["U"]
        self.sizes = _SAMPLE | {"patches": patches_per_token(model.config) * tokens,
                                "values": values_per_patch(model.config)}
        model.model.language_model = model.lm_head = None

    def forward(self, pixel_values: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
                window_index: Tensor, cu_window_seqlens: Tensor) -> Tensor:
        # the longest lengths are for flash attention; the op reads the bounds
        return self.model.model.visual(
            pixel_values, grid_thw=None, position_ids=position_ids, cu_seqlens=cu_seqlens,
            window_index=window_index, cu_window_seqlens=cu_window_seqlens, max_seqlen=1,
            max_window_seqlen=1).pooler_output
