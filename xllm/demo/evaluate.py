"""Accuracy of a demo checkpoint on held-out questions: `python -m xllm.demo.evaluate [DIR]`.

An answer counts when the greedy text equals the expected one exactly, working included.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from xllm.demo import CHECKPOINT
from xllm.demo.tasks import TASKS, Split, examples

SEED = 1
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@torch.inference_mode()
def answers(model: PreTrainedModel, tokenizer: Tokenizer, questions: list[str]) -> list[str]:
    """Greedy answers to single-turn questions, all in one batch padded on the left."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=64,
        do_sample=False,
    )
    given = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(given, skip_special_tokens=True)


def accuracy(
    model: PreTrainedModel, tokenizer: Tokenizer, limit: int, show: int = 0
) -> dict[str, tuple[int, int]]:
    """Right answers and questions asked, per task; prints up to `show` wrong answers of each."""
    model.eval()
    scores: dict[str, tuple[int, int]] = {}
    for task in TASKS:
        pairs = examples(task, Split.HELD_OUT, limit, SEED)
        given = answers(model, tokenizer, [question for question, _ in pairs])
        wrong = [(pair, text) for pair, text in zip(pairs, given, strict=True) if text != pair[1]]
        scores[task] = (len(pairs) - len(wrong), len(pairs))
        for (question, expected), text in wrong[:show]:
            print(f"{task}: {question!r} -> {text!r}, not {expected!r}")
    return scores


def main() -> None:
    """Print a table of accuracies, one column per dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=CHECKPOINT)
    parser.add_argument("--limit", type=int, default=300, help="questions per task")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per task")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    columns = {}
    for name, dtype in DTYPES.items():
        model = AutoModelForCausalLM.from_pretrained(options.directory, dtype=dtype)
        columns[name] = accuracy(model, tokenizer, options.limit, options.show)
    print("| task | held-out questions |", " | ".join(columns), "|")
    print("|---|---|" + "---|" * len(columns))
    for task in TASKS:
        asked = columns["fp32"][task][1]
        cells = " | ".join(f"{100 * right[task][0] / asked:.1f} %" for right in columns.values())
        print(f"| {task} | {asked} | {cells} |")


if __name__ == "__main__":
    main()
