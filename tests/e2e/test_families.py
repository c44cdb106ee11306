"""Every promised family: greedy float32 tokens equal those of ``transformers``; README's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_tokens import compare
from tests.tiny import FAMILIES, save_checkpoint
from tests.zoo import MODELS, UNNAMED, VISION, ZOO

README = Path(__file__).parents[2] / "README.md"
#: Those whose kernels or graphs differ most from a plain decoder's; compiled in the slow suite.
COMPILED = ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gemma3",
            "gpt_oss", "mimo_v2")


@pytest.mark.parametrize("name", ZOO)
def test_eager_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    """Prompts of 1 to 90 tokens in steps of 32: prefill, chunks and decode share a batch."""
    path = save_checkpoint(ZOO[name](), tmp_path / name)
    compare(path, "eager", prompts=6, tokens=10, vocab=96, max_tokens=32, max_sequences=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNNAMED)
def test_families_that_nobody_named_work_too(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(UNNAMED[name](), tmp_path / name)
    compare(path, "eager", prompts=6, tokens=10, vocab=96, max_tokens=32, max_sequences=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(ZOO[name](), tmp_path / name)
    compare(path, "inductor", prompts=16, tokens=24, vocab=96)


def families_table() -> str:
    """The README's table: a row per family that this file, or its sisters, run."""
    compiled = {*COMPILED, *VISION, *(name for name in FAMILIES if "-" not in name)}
    rows = [f"| `{name}` | {models} | {'eager, compiled' if name in compiled else 'eager'} |"
            for name, models in MODELS.items()]
    return "\n".join(["| model_type | models | tokens compared |", "|---|---|---|", *rows])


def test_readme_has_the_table() -> None:
    assert families_table() in README.read_text(), f"README.md must contain\n{families_table()}"


def test_every_family_of_the_zoo_is_in_the_table() -> None:
    known = {name.split("-")[0] for name in (*ZOO, *FAMILIES, *VISION)}
    assert set(MODELS) == known
