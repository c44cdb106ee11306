"""A tiny random model that sees images: configuration, checkpoint, pictures, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny import randomise
from xllm.vision import encode_inputs, image_tokens, values_per_patch

IMAGE, START, END = 90, 92, 93
#: In patches: one merged window, and one of 5 x 3 tokens over several windows, some of them cut.
SMALL, LARGE = (1, 4, 4), (1, 10, 6)


def config(**text: object) -> Qwen2_5_VLConfig:
    """Two decoder layers; three vision layers, the middle one with full attention."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
             "bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
              "patch_size": 4, "window_size": 16, "out_hidden_size": 32,
              "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(
        text_config=sizes | {"rope_parameters": rope} | text, vision_config=vision,
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=START,
        vision_end_token_id=END, tie_word_embeddings=bool(text.get("tie_word_embeddings")))


def save(directory: Path, **text: object) -> Path:
    """Write a checkpoint with random float32 weights; returns ``directory``."""
    model = Qwen2_5_VLForConditionalGeneration._from_config(config(**text), dtype=torch.float32)
    randomise(model)
    model.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Picture:
    """Random pixels of a grid in patches."""

    grid: tuple[int, int, int]
    seed: int

    @property
    def grids(self) -> Tensor:
        """``[1, 3]``."""
        return torch.tensor([self.grid])

    @property
    def pixels(self) -> Tensor:
        """``[patches, values]``, as an image processor makes them."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.grids.prod(), values_per_patch(config()), generator=generator)

    @property
    def tokens(self) -> list[int]:
        """What stands for the picture in a prompt."""
        return [START, *[IMAGE] * image_tokens(config(), self.grids)[0], END]


def inputs_of(picture: Picture) -> dict[str, Tensor]:
    """Inputs of the encode graph for one picture."""
    return {"pixel_values": picture.pixels, **encode_inputs(config(), picture.grids)}
