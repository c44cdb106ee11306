"""Passes that are no rules, broken on purpose on a tiny model: the build or the check must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import fx

from tests.tiny import captured, stages
from xllm.compiler.runner import run_pass
from xllm.compiler.verify import Checker
from xllm.graph import Input, copy_program
from xllm.ops import REGISTRY
from xllm.ops.norm import rms_norm
from xllm.passes import (
    cse,
    drop_noops,
    lower,
    merge_projections,
    pack_linear,
    page_attention,
    roll_layers,
    select_logits_rows,
    static_views,
)
from xllm.weights import Concat, Recipe, rename


@dataclass(frozen=True)
class Mutant:
    """One name in a pass module replaced."""

    what: str
    module: object
    name: str
    value: object
    family: str = "qwen3"

    @property
    def item(self) -> str:
        """The pass."""
        return self.module.__name__.rsplit(".", 1)[-1]


def swapped_shape(node: fx.Node) -> list[int] | None:
    """Heads and head size the wrong way round."""
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    return [*shape[:2], *shape[:1:-1]] if shape.count(-1) <= 1 else None


def without_neighbours(segment: object, layer: int,
                       recipes: Callable = roll_layers._local_recipes) -> list[Recipe | None]:
    """The next layer's norm taken for the layer's own."""
    return [r and rename(r, lambda name: name.replace("next.input_layernorm",
                                                      "post_attention_layernorm"))
            for r in recipes(segment, layer)]


def without_text(nodes: list, segment: Callable = roll_layers._segment) -> object:
    """Layers of the same length taken for equal, whatever their constants."""
    made = segment(nodes)
    made.text = made.text.replace(", 3)", ")")
    return made


OTHER_NORM = REGISTRY | {"rms_norm": replace(
    REGISTRY["rms_norm"], reference=lambda x, w, eps: rms_norm(x, w, eps + 0.1))}
NO_KERNELS_LOST = {name: op for name, op in REGISTRY.items() if name != "silu_mul"}

MUTANTS = (
    Mutant("swapped shape", static_views, "_literal_shape", swapped_shape),
    Mutant("any type is the same", drop_noops, "same_type", lambda a, b: True),
    Mutant("any factor is neutral", drop_noops, "_NEUTRAL",
           {torch.ops.aten.add.Tensor: 1e-6}),
    Mutant("arguments ignored", cse, "_key", lambda node: (node.target,)),
    Mutant("other rows", select_logits_rows, "Input", lambda name: Input("slot_mapping")),
    Mutant("neighbour's norm", roll_layers, "_local_recipes", without_neighbours),
    Mutant("window ignored", roll_layers, "_segment", without_text, "qwen2-window"),
    Mutant("inputs mixed up", page_attention, "INPUTS",
           ("block_table", "seq_lens", "query_start_loc")),
    Mutant("defaults lost", page_attention, "full_args",
           lambda node: [*node.args[:3], 1.0, None, None, None]),
    Mutant("window lost", page_attention, "full_args",
           lambda node: [*node.args[:4], None, None, None], "qwen2-window"),
    Mutant("concat reversed", merge_projections, "Concat", lambda parts: Concat(parts[::-1])),
    Mutant("every second group", merge_projections, "siblings",
           lambda gm, all_of=merge_projections.siblings: all_of(gm)[::2]),
    Mutant("not packed", pack_linear, "Pack", lambda part: part),
    Mutant("other block", pack_linear, "BLOCK", 16),
    Mutant("other eps", lower, "REGISTRY", OTHER_NORM),
    Mutant("reference missing", lower, "REGISTRY", NO_KERNELS_LOST),
)


def build_and_check(mutant: Mutant) -> None:
    """Run the pass on the program that it meets in the pipeline; compare the values."""
    found, _, ctx = stages(mutant.family, torch.bfloat16)
    stage = next(s for s in found if s.item.name == mutant.item)
    program = copy_program(stage.before)
    run_pass(stage.item, program, ctx, stage.item.before)
    check = Checker(captured(mutant.family, torch.bfloat16)[0], draws=4)
    check(stage.before, program, ctx, stage.item)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.item}: {m.what}")
def test_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    stages(mutant.family, torch.bfloat16)  # cached before anything is broken
    monkeypatch.setattr(mutant.module, mutant.name, mutant.value)
    with pytest.raises(Exception) as error:  # the build, or the check of the values
        build_and_check(mutant)
    print(f"{mutant.item}, {mutant.what}: {type(error.value).__name__}: "
          f"{str(error.value).splitlines()[0][:120]}")


@pytest.mark.parametrize("item", sorted({m.item for m in MUTANTS}))
def test_the_unbroken_pass_passes(item: str) -> None:
    build_and_check(next(m for m in MUTANTS if m.item == item))
