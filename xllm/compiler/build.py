"""``compile_model``: checkpoint → Program → passes → blobs → artifact."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save

import xllm
from xllm import targets, weights
from xllm.artifact import Artifact, ArtifactWriter, Factor, cache_dir, key_of
from xllm.backends import BackendError, BuildOptions, find_backend
from xllm.checkpoint import Checkpoint, CheckpointError
from xllm.compiler import report
from xllm.compiler.capture import capture
from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.runner import PassRecord, run_pipeline, snapshot, symbol_names
from xllm.compiler.verify import Checker
from xllm.config import CompileConfig
from xllm.graph import INPUT_DIMS, Program, State, Weight, placeholders
from xllm.kernels import build as kernels
from xllm.passes.core import ModelFacts, PassContext
from xllm.progress import Reporter
from xllm.serialize import bind_to_json, graph_to_json

#: Packages and modules whose source decides what is compiled.
COMPILING = ("ops", "passes", "compiler", "backends", "graph.py", "levels.py", "serialize.py",
             "targets.py", "torch_private.py", "weights.py", "checkpoint.py", "config.py")


@dataclass(frozen=True)
class Plan:
    """A compile that has been thought through: what, for what, and where it goes."""

    config: CompileConfig
    checkpoint: Checkpoint
    target: targets.Target
    backend: str
    dtype: torch.dtype
    factors: dict[str, Factor]
    destination: Path

    @property
    def key(self) -> str:
        """Identity of the artifact."""
        return key_of(self.factors)


def source_hash() -> str:
    """sha256 over the source that compiles."""
    digest = hashlib.sha256()
    root = Path(xllm.__file__).parent
    for name in COMPILING:
        files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name]
        for file in files:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def choose_backend(config: CompileConfig, target: targets.Target, reporter: Reporter) -> str:
    """The backend asked for; ``auto`` falls back to eager, and says so, without a compiler."""
    if config.backend != "auto":
        return config.backend
    try:
        kernels.find_compiler()
    except kernels.CompilerMissing as error:
        reporter.say(f"warning: {error}; using --backend eager, which is slow")
        return "eager"
    return target.backend


def plan(config: CompileConfig, out: Path | None, reporter: Reporter) -> Plan:
    """Resolve model, target, backend and dtype; compute the key. Raises one clear error."""
    target = targets.find(config.target)
    checkpoint = Checkpoint.open(config.model)
    dtype = (target.served_dtype(checkpoint.dtype) if config.dtype == "auto"
             else targets.DTYPES[config.dtype])
    backend = choose_backend(config, target, reporter)
    factors = {
        "checkpoint": Factor(checkpoint.fingerprint, "weights and configuration"),
        "target": Factor(target.name, "instruction set and kernels"),
        "backend": Factor(backend, "what the blobs are"),
        "dtype": Factor(str(dtype).removeprefix("torch."), "every tensor in the graphs"),
        "max_tokens": Factor(config.max_tokens, "bound of T in the graphs"),
        "max_sequences": Factor(config.max_sequences, "bound of S in the graphs"),
        "page_size": Factor(config.page_size, "shape of the KV cache"),
        "xllm": Factor(f"{xllm.__version__} {source_hash()[:16]}", "capture, passes, backends"),
        "kernels": Factor(kernels.sources_hash()[:16], "hand-written kernels"),
        "transformers": Factor(transformers.__version__, "the code that is captured"),
        **{name: Factor(value, "compiled code is bound to it")
           for name, value in find_backend(backend).host_factors().items()},
    }
    destination = out or cache_dir() / "artifacts" / key_of(factors)[:24]
    return Plan(config, checkpoint, target, backend, dtype, factors, destination)


def find_cached(planned: Plan) -> Artifact | None:
    """The artifact at the destination, if it has this plan's key."""
    if not Artifact.is_artifact(planned.destination):
        return None
    artifact = Artifact(planned.destination)
    return artifact if artifact.manifest.get("key") == planned.key else None


def compile_model(planned: Plan, reporter: Reporter, dump: Path | None = None,
                  verify: bool = False) -> Artifact:
    """Compile and write the artifact; nothing is left behind on failure."""
    reporter.say(f"compiling {planned.config.model} for {planned.target.name} "
                 f"({planned.backend}, {planned.dtype}) into {planned.destination}")
    with reporter.phase("capture"):
        program, facts = capture(planned.checkpoint.config, planned.dtype)
        check_weights(program, planned.checkpoint)
    records = run_passes(planned, program, facts, reporter, verify)
    if dump:
        report.dump(records, dump)
    writer = ArtifactWriter(planned.destination)
    try:
        manifest = build_blobs(planned, program, facts, writer, reporter)
        manifest |= describe(planned, program, facts, records, reporter)
        write_graphs(program, records, writer)
        writer.text("report/index.html", report.html(records, manifest))
        writer.commit(manifest)
    except BaseException:
        writer.discard()
        raise
    return Artifact(planned.destination)


def run_passes(planned: Plan, program: Program, facts: ModelFacts, reporter: Reporter,
               verify: bool) -> list[PassRecord]:
    """Run the pipeline table on a captured program."""
    ctx = PassContext(facts, planned.target, planned.dtype, planned.config.page_size,
                      program.inputs)
    with reporter.phase("passes", total=len(PIPELINE)) as phase:
        check = Checker(program) if verify else None
        return run_pipeline(program, ctx, PIPELINE, check, phase.step)


def check_weights(program: Program, checkpoint: Checkpoint) -> None:
    """Every parameter of the graph must be in the checkpoint with its shape."""
    (gm,) = program.pieces.values()
    for node in placeholders(gm, Weight):
        (name,) = weights.leaves(node.meta["bind"].recipe)
        expected, found = tuple(node.meta["val"].shape), checkpoint.info(name).shape
        if expected != found:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} has shape {list(found)}, "
                                  f"config.json implies {list(expected)}")


def kernel_library(reporter: Reporter) -> Path:
    """The compiled CPU kernels for this machine, from the user's cache or built now."""
    isa = kernels.detect_isa()
    name = f"cpu-{isa}-torch{torch.__version__}-{kernels.sources_hash()[:16]}.so"
    library = cache_dir() / "kernels" / name
    if not library.is_file():
        try:
            with reporter.phase(f"kernels ({isa})"):
                kernels.compile_cpu(isa, library)
        except (kernels.CompilerMissing, kernels.CompileFailed) as error:
            raise BackendError(f"{error}; --backend eager needs no compiler") from error
    return library


def build_blobs(planned: Plan, program: Program, facts: ModelFacts, writer: ArtifactWriter,
                reporter: Reporter) -> dict:
    """Compile every piece in every variant; returns the manifest's part about code."""
    config = planned.config
    backend = find_backend(planned.backend)
    sizes = {"T": config.max_tokens, "S": config.max_sequences, "R": config.max_tokens,
             "M": -(-facts.context_length // config.page_size), "P": 1 << 24}
    static = planned.target.static_buckets if planned.backend != "eager" else ()
    variants = {"symbolic": {}} | {f"decode_{n}": dict.fromkeys("TSR", n) for n in static}
    blobs: dict[str, dict[str, str]] = {}
    kernel_blobs = []
    if planned.backend != "eager":
        kernel_blobs.append(writer.blob(kernel_library(reporter)))
    total = len(variants) * len(program.pieces)
    with reporter.phase(f"compile ({planned.backend})", total=total) as phase, \
            tempfile.TemporaryDirectory() as scratch:
        for variant, fixed in variants.items():
            for piece, gm in program.pieces.items():
                phase.step(f"{piece} ({variant})")
                out = Path(scratch) / f"{variant}-{piece}.pt2"
                options = BuildOptions(sizes, symbol_names(program), fixed)
                backend.build(gm, options, out)
                blobs.setdefault(variant, {})[piece] = writer.blob(out)
    return {"variants": blobs, "kernels": kernel_blobs,
            "buckets": bucket_table(config, static)}


def bucket_table(config: CompileConfig, static: tuple[int, ...]) -> list[dict]:
    """1, 2, 4, 8, then multiples of 16; the last row is the symbolic graph at its bound."""
    sizes = [n for n in (1, 2, 4, 8, *range(16, config.max_sequences, 16), config.max_sequences)
             if n <= config.max_sequences]
    rows = [{"tokens": n, "variant": f"decode_{n}" if n in static else "symbolic",
             "padded": n in static} for n in sorted(set(sizes))]
    if config.max_tokens > config.max_sequences:
        rows.append({"tokens": config.max_tokens, "variant": "symbolic", "padded": False})
    return rows


def kv_bytes_per_page(program: Program, page_size: int) -> int:
    """Bytes of one KV page over all layers."""
    total = 0
    for call in program.schedule:
        for node in placeholders(program.pieces[call.piece], State):
            _, pair, groups, tokens, dim = node.meta["val"].shape
            total += pair * groups * tokens * dim * node.meta["val"].element_size()
    return total


def describe(planned: Plan, program: Program, facts: ModelFacts, records: list[PassRecord],
             reporter: Reporter) -> dict:
    """The manifest's part about model, graphs, memory and passes."""
    config = planned.config
    pieces = {
        name: {"calls": program.calls(name), "nodes": len(gm.graph.nodes),
               "signature": [row for row in graph_to_json(gm) if row["op"] == "placeholder"]}
        for name, gm in program.pieces.items()
    }
    return {
        "key": planned.key,
        "factors": {name: vars(f) for name, f in planned.factors.items()},
        "model": {"name": planned.checkpoint.path.name if config.model != "demo" else "demo",
                  "source": source_of(planned), "architecture": facts.architecture,
                  "dtype": planned.factors["dtype"].value, "layers": facts.num_layers,
                  "vocab_size": facts.vocab_size, "context_length": facts.context_length},
        "pieces": pieces,
        "schedule": [vars(call) | {"outputs": list(call.outputs)} for call in program.schedule],
        "memory": {"page_size": config.page_size, "max_tokens": config.max_tokens,
                   "max_sequences": config.max_sequences,
                   "kv_bytes_per_page": kv_bytes_per_page(program, config.page_size),
                   "weight_bytes": weight_bytes(program)},
        "symbols": {dim: name for name, dims in INPUT_DIMS.items() for dim in dims
                    if isinstance(dim, str)},
        "passes": [{"name": r.name, "level": r.level, "sites": r.sites, "expected": r.expected,
                    "milliseconds": round(r.milliseconds, 1), "nodes": r.nodes, "error": r.error}
                   for r in records],
        "seconds": {name: round(s, 2) for name, s in reporter.seconds.items()},
    }


def source_of(planned: Plan) -> str:
    """How to find the checkpoint again: ``demo``, a hub id, or an absolute directory."""
    directory = Path(planned.config.model).expanduser().is_dir()
    return str(planned.checkpoint.path) if directory else planned.config.model


def weight_bytes(program: Program) -> int:
    """Bytes of all parameters in memory, shared ones once."""
    sizes = {}
    for call in program.schedule:
        for node in placeholders(program.pieces[call.piece], Weight):
            recipe = weights.rename(node.meta["bind"].recipe, call.leaves.__getitem__)
            val = node.meta["val"]
            sizes[recipe] = val.numel() * val.element_size()
    return sum(sizes.values())


def resolved_recipes(program: Program) -> list[dict]:
    """Per call: placeholder → recipe over checkpoint tensors."""
    return [
        {node.name: weights.to_json(
            weights.rename(node.meta["bind"].recipe, call.leaves.__getitem__))
         for node in placeholders(program.pieces[call.piece], Weight)}
        for call in program.schedule
    ]


def write_graphs(program: Program, records: list[PassRecord], writer: ArtifactWriter) -> None:
    """Readable graphs per pass, lowered graphs as JSON, recipe and constants."""
    for name, text in report.listings(records).items():
        writer.text(f"graphs/{name}", text)
    for name, gm in program.pieces.items():
        writer.text(f"graphs/lowered/{name}.json", json.dumps(graph_to_json(gm), indent=0))
    writer.text("weights/recipe.json", json.dumps(resolved_recipes(program), indent=1))
    (writer.path / "weights/constants.safetensors").write_bytes(
        save({k: v.contiguous() for k, v in program.constants.items()}))
