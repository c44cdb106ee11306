"""Train the demo model from nothing on two CPU cores: `python -m xllm.demo.train --out DIR`.

Rows are chats of unrelated questions, so every task is also seen late in a long conversation; the
loss is taken on what the assistant says. The layers' matrices learn by Muon, the rest by AdamW.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from xllm.demo import tasks
from xllm.demo.evaluate import accuracy
from xllm.demo.tokenizer import CONTEXT_LENGTH, build_tokenizer

TOKENS_PER_STEP = 4096
ROW_LENGTHS = (256,) * 7 + (1024,)  # one step in eight sees long chats
IGNORED = -100  # the label cross entropy skips
SHARES = {
    "add": 22, "subtract": 20, "reverse": 18, "spell": 10, "count": 4, "day_after": 2, "echo": 8,
    "json": 6, "sort": 10,
}  # fmt: skip
SMALL_TALK_SHARE = 0.01
SYSTEM_SHARE = 0.05
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are helpful.", "Be brief.", "Answer the question.",
    "You are a tiny demo model.",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What one training run is told; see `--help`."""

    out: Path
    start: Path | None
    steps: int
    minutes: float
    rate: float
    seed: int
    every: int
    threads: int


class Chats:
    """An endless stream of chats as (token ids, labels); labels are `IGNORED` outside answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = Random(seed)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _pair(self) -> tuple[str, str, bool]:
        """Question, answer, and whether the answer is trained letter by letter.

        A reversed word is: which merges it has could only be known by reading ahead.
        """
        if self.rng.random() < SMALL_TALK_SHARE:
            return *self.rng.choice(tasks.SMALL_TALK), False
        task = self.rng.choices(list(SHARES), list(SHARES.values()))[0]
        item = tasks.draw(task, tasks.Split.TRAIN, self.rng)
        return item.question, item.answer, task == "reverse"

    def _turn(self) -> tuple[list[int], list[int]]:
        question, answer, by_letter = self._pair()
        prompt = self._ids(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        pieces = answer if by_letter else [answer]
        reply = [token for piece in pieces for token in self._ids(piece)] + self._ids("<|im_end|>")
        newline = self._ids("\n")
        ignored = [IGNORED] * len(prompt)
        return prompt + reply + newline, ignored + reply + [IGNORED] * len(newline)

    def row(self, length: int) -> tuple[list[int], list[int]]:
        """Turns, now and then behind a new system prompt, cut at `length` tokens."""
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            if self.rng.random() < SYSTEM_SHARE or (not ids and self.rng.random() < 0.2):
                prompt = self.rng.choice(SYSTEM_PROMPTS)
                system = self._ids(f"<|im_start|>system\n{prompt}<|im_end|>\n")
                ids, labels = ids + system, labels + [IGNORED] * len(system)
            turn_ids, turn_labels = self._turn()
            ids, labels = ids + turn_ids, labels + turn_labels
        return ids[:length], labels[:length]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, both `[rows, length]` int64 with rows * length = `TOKENS_PER_STEP`."""
        length = self.rng.choice(ROW_LENGTHS)
        rows = [self.row(length) for _ in range(TOKENS_PER_STEP // length)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([labels for _, labels in rows])


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh float32 Qwen3 of about 2.5 million parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def build_optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms, at one learning rate."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def rate_factor(step: int, progress: float) -> float:
    """Linear warm-up over 50 steps, and a cosine down to nothing as `progress` goes to 1."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write an ordinary bfloat16 checkpoint; the model in memory stays float32."""
    half = Qwen3ForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def load_or_build(options: Options) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The checkpoint to go on from, else a fresh model with a tokenizer trained for it."""
    if options.start:
        model = Qwen3ForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(options.start)
    tokenizer = build_tokenizer(options.seed)
    return build_model(tokenizer), tokenizer


def train(options: Options) -> None:
    """Train, writing and evaluating the checkpoint now and then and at the end."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model, tokenizer = load_or_build(options)
    chats = Chats(tokenizer, options.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    optimizers = build_optimizers(model, options.rate)
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = options.rate * rate_factor(step, progress)
        ids, labels = chats.batch()
        loss = model.train()(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, seconds = step + 1, time.monotonic() - started
        progress = max(step / options.steps, seconds / (60 * options.minutes))
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
        if step % options.every == 0 or progress >= 1:
            save(model, tokenizer, options.out)
            print(step, accuracy(model, tokenizer, limit=100), flush=True)


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--steps", type=int, default=2000, help="train for so many steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="but no longer than this")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    train(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
