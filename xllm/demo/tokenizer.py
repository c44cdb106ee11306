"""The demo model's tokenizer: byte-level BPE, one token per digit, ChatML turns."""

from __future__ import annotations

import string
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from xllm.demo import tasks, words

CONTEXT_LENGTH = 2048
VOCAB_SIZE = 640
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# A word with the space before it, one digit, or the signs between two of those.
PIECE = r" ?\p{L}+|\p{N}|[^\p{L}\p{N}]+?(?= ?\p{L})|[^\p{L}\p{N}]+"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def corpus(seed: int) -> list[str]:
    """What the merges are learned from: every task's wording, and each listed word twice."""
    rng = Random(seed)
    spelled_out = ("reverse", "spell", "echo")  # random letters, in which merges would be noise
    lines = ["system", "user", "assistant"] * 500
    lines += [f" {letter}" for letter in string.ascii_letters] * 500
    lines += [text for pair in tasks.SMALL_TALK for text in pair]
    for task in tasks.TASKS:
        for _ in range(2000):
            item = tasks.draw(task, tasks.Split.TRAIN, rng)
            lines += [item.question, item.answer] if task not in spelled_out else []
    for templates in (tasks.REVERSE, tasks.SPELL, tasks.ECHO):
        lines += [template.format(w="a", t="a") for template in templates] * 100
    for word in words.COMMON + words.NAMES + words.CITIES:
        lines += [word, f" {word}"]
    return lines


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the merges; padding is `<|endoftext|>`, a turn and a generation end in `<|im_end|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
