"""A Hugging Face checkpoint: configuration, tokenizer, and tensors that are read when asked for."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from xllm import demo
from xllm.errors import UserError

WHOLE_FILE, WINDOW = 64 << 20, 4096  # bytes
DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8,
    "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
}
#: Those a model can be served in; the others hold quantised weights and what belongs to them.
SERVED = ("F32", "BF16", "F16")


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, shape and stored dtype, read from the safetensors header."""

    file: Path
    shape: tuple[int, ...]
    stored: str

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of this tensor, called ``name``; raises :class:`CheckpointError` if unknown."""
        if self.stored not in DTYPES:
            raise CheckpointError(f"{self.file}: tensor {name} has dtype {self.stored}; "
                                  f"accepted: {', '.join(DTYPES)}")
        return DTYPES[self.stored]


def resolve(model: str, trust_remote_code: bool = False) -> Path:
    """Directory of ``model``: ``demo``, a local directory, or a hub id (downloaded or cached).

    Python files are downloaded only where they are trusted.
    """
    if model == "demo":
        return demo.CHECKPOINT
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path.resolve()
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"model {model!r} is no directory; accepted: a checkpoint directory, "
                              "a hub id (owner/name), or demo")
    return _download(model, ["*.py"] if trust_remote_code else [])


def _download(hub_id: str, more: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt",
                    *more]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"model {hub_id!r} is no directory here and could not be fetched "
                              f"from the hub: {reason}") from error


def _read_header(file: Path) -> dict:
    """The JSON header of a safetensors file, checked against the file's size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"{file} is truncated: {size} bytes hold no complete header")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file} is no safetensors file: no JSON header") from error
    try:
        tensors = [t for k, t in header.items() if k != "__metadata__"]
        end = max((t["data_offsets"][1] for t in tensors), default=0)
        _ = [(t["dtype"], tuple(t["shape"])) for t in tensors]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file} is no safetensors file: bad header, {error!r}") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{file} is truncated or padded: {size} bytes, "
                              f"its header describes {8 + length + end}")
    return header


def _windows(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what a fingerprint reads of a file."""
    if size <= WHOLE_FILE:
        yield 0, size
        return
    header = _read_header(file)
    base = size - max(t["data_offsets"][1] for k, t in header.items() if k != "__metadata__")
    yield 0, base
    for name in sorted(header.keys() - {"__metadata__"}):
        begin, end = (base + o for o in header[name]["data_offsets"])
        for offset in (begin, (begin + end) // 2, max(begin, end - WINDOW)):
            yield offset, min(WINDOW, end - offset)


def _config_class(architectures: list[str]) -> type[PretrainedConfig] | None:
    """Configuration of the first of these model classes that ``transformers`` has, if any."""
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
             *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    found = (getattr(transformers, name).config_class for name in architectures if name in known)
    return next(found, None)


class Checkpoint:
    """One checkpoint directory. Nothing but headers is read until a tensor is loaded.

    Code that comes with it runs only under ``trust_remote_code``.
    """

    def __init__(self, path: Path, trust_remote_code: bool = False) -> None:
        self.path = path
        self.trust_remote_code = trust_remote_code
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} holds no config.json; a Hugging Face checkpoint has one")

    @classmethod
    def open(cls, model: str, trust_remote_code: bool = False) -> Checkpoint:
        """Open ``demo``, a directory or a hub id; raises :class:`CheckpointError`."""
        return cls(resolve(model, trust_remote_code), trust_remote_code)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration; an unknown model type is read as its architecture's own."""
        try:
            raw = json.loads((self.path / "config.json").read_text())
            kind = raw.get("model_type")
            if (self.trust_remote_code and "auto_map" in raw) or kind in CONFIG_MAPPING:
                return AutoConfig.from_pretrained(
                    self.path, trust_remote_code=self.trust_remote_code)
            known = _config_class(raw.get("architectures") or [])
            if known:
                rest = {k: v for k, v in raw.items() if k not in ("model_type", "auto_map")}
                return known.from_dict(rest)
            if "auto_map" in raw:
                raise ValueError(f"model_type {kind!r} is unknown to transformers and comes with "
                                 "its own code, which runs under --trust-remote-code only")
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{self.path / 'config.json'}: {reason}") from error

    @cached_property
    def headless(self) -> bool:
        """Whether it is an embedding model that was stored without its language head."""
        return ((self.path / "modules.json").is_file()
                and not self.config.get_text_config().tie_word_embeddings
                and not any(name.startswith("lm_head.") for name in self.tensors))

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory holds a tokenizer; without one, prompts are token ids."""
        return any((self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template."""
        try:
            return AutoTokenizer.from_pretrained(
                self.path, config=self.config, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            raise CheckpointError(f"{self.path}: no usable tokenizer: "
                                  f"{str(error).splitlines()[0]}") from error

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer: generation_config.json, else config.json, else none."""
        source = self.config.get_text_config().eos_token_id
        if (self.path / "generation_config.json").is_file():
            try:
                named = GenerationConfig.from_pretrained(self.path).eos_token_id
            except Exception as error:
                raise CheckpointError(f"{self.path / 'generation_config.json'}: "
                                      f"{str(error).splitlines()[0]}") from error
            source = source if named is None else named
        return frozenset([source] if isinstance(source, int) else source or ())

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the checkpoint, from the headers of its files."""
        found = {}
        for file in self._files():
            for name, entry in _read_header(file).items():
                if name != "__metadata__":
                    found[name] = TensorInfo(file, tuple(entry["shape"]), entry["dtype"])
        return found

    def _files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} has no weight_map: {error!r}") from error
        else:
            names = ["model.safetensors"]
        for name in names:
            if not (self.path / name).is_file():
                if any(self.path.glob("pytorch_model*.bin")):
                    raise CheckpointError(f"{self.path} holds pytorch_model.bin, a pickle; accepted"
                                          ": safetensors (save_pretrained writes them)")
                raise CheckpointError(f"{self.path} lacks the weight file {name}")
        return [self.path / name for name in names]

    def info(self, name: str) -> TensorInfo:
        """Header entry of a tensor; raises :class:`CheckpointError` where it is missing."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} lacks the tensor {name}")
        return self.tensors[name]

    def load(self, name: str) -> Tensor:
        """Read one tensor; raises :class:`CheckpointError`."""
        info = self.info(name)
        try:
            with safe_open(info.file, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: cannot read {name}: {error}") from error

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype most of the weights are stored in; quantised ones do not count."""
        totals = dict.fromkeys(SERVED, 0)
        for info in self.tensors.values():
            if info.stored in totals:
                totals[info.stored] += torch.Size(info.shape).numel()
        if not self.tensors:
            raise CheckpointError(f"{self.path} holds no tensors")
        if not any(totals.values()):
            name, info = next(iter(self.tensors.items()))
            raise CheckpointError(f"{info.file}: tensor {name} has dtype {info.stored}; "
                                  f"accepted: {', '.join(SERVED)}")
        return DTYPES[max(totals, key=totals.__getitem__)]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and the weight files; of files over 64 MiB, over samples.

        4 KiB from the start, middle and end of each tensor: a change of any one matrix shows, and
        terabytes need not be read.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for code in sorted(self.path.glob("*.py")) if self.trust_remote_code else ():
            digest.update(code.read_bytes())
        for file in self._files():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                for offset, length in _windows(file, size):
                    stream.seek(offset)
                    digest.update(stream.read(length))
        return digest.hexdigest()
