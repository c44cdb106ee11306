"""``compile_model``: checkpoint → Program → passes → blobs → artifact."""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

from xllm import weights
from xllm.artifact import Artifact, ArtifactWriter, cache_dir
from xllm.backends import BackendError, BuildOptions, find_backend
from xllm.checkpoint import Checkpoint, CheckpointError
from xllm.compiler import report
from xllm.compiler.capture import capture
from xllm.compiler.manifest import bucket_table, describe, resolved_recipes, timings
from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.plan import Plan
from xllm.compiler.runner import PassRecord, run_pipeline, symbol_names
from xllm.compiler.verify import Checker
from xllm.graph import Program, Weight, placeholders
from xllm.kernels import build as kernels
from xllm.passes.core import ModelFacts, PassContext
from xllm.progress import Reporter
from xllm.serialize import graph_to_json


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
        manifest |= describe(planned, program, facts, records)
        write_graphs(program, records, writer)
        spent = timings(records, reporter)
        writer.text("report/index.html", report.html(records, manifest | spent))
        writer.commit(manifest, spent)
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
    sizes = {"T": config.max_tokens, "S": config.max_sequences, "R": max(config.max_tokens, 2),
             "M": -(-facts.context_length // config.page_size), "P": 1 << 24}
    static = planned.target.static_buckets if planned.backend != "eager" else ()
    variants = {"symbolic": {}} | {f"decode_{n}": dict.fromkeys("TSR", n) for n in static}
    blobs: dict[str, dict[str, str]] = {}
    kernel_blobs = []
    if planned.backend != "eager":
        kernel_blobs.append(writer.blob(kernel_library(reporter)))
    total = len(variants) * len(program.pieces)
    gc.collect()
    gc.freeze()  # the captured model's objects would be walked again and again while compiling
    with reporter.phase(f"compile ({planned.backend})", total=total) as phase, \
            tempfile.TemporaryDirectory() as scratch:
        for variant, fixed in variants.items():
            for piece, gm in program.pieces.items():
                phase.step(f"{piece} ({variant})")
                out = Path(scratch) / f"{variant}-{piece}.pt2"
                options = BuildOptions(sizes, symbol_names(program), fixed)
                backend.build(gm, options, out)
                blobs.setdefault(variant, {})[piece] = writer.blob(out)
    gc.unfreeze()
    return {"variants": blobs, "kernels": kernel_blobs,
            "buckets": bucket_table(config, static)}


def write_graphs(program: Program, records: list[PassRecord], writer: ArtifactWriter) -> None:
    """Readable graphs per pass, lowered graphs as JSON, recipe and constants."""
    for name, text in report.listings(records).items():
        writer.text(f"graphs/{name}", text)
    for name, gm in program.pieces.items():
        writer.text(f"graphs/lowered/{name}.json", json.dumps(graph_to_json(gm), indent=0))
    writer.text("weights/recipe.json", json.dumps(resolved_recipes(program), indent=1))
    (writer.path / "weights/constants.safetensors").write_bytes(
        save({k: v.contiguous() for k, v in program.constants.items()}))
