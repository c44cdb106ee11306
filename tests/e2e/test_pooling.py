"""Embeddings and relevance scores of a tiny Qwen3 equal those of ``transformers``."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3Model

from tests.tiny import randomise, save_checkpoint
from xllm import LLM, SamplingParams
from xllm.checkpoint import CheckpointError
from xllm.demo import CHECKPOINT
from xllm.runtime.async_engine import AsyncEngine
from xllm.runtime.embedding import read_embedder
from xllm.runtime.generate import generate
from xllm.runtime.request import Prompt
from xllm.runtime.sampling_params import PoolingParams
from xllm.runtime.server.app import create_app

TEXTS = ["Hi", "Reverse the word stone.", "count from three to nine " * 8]
SIZES = {"vocab_size": 704, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": None}
DOCUMENTS = ["A stone is hard.", "Two and two make four.", "no", "yes " * 40]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 in float32, with the demo's tokenizer and tokens for yes and no."""
    path = tmp_path_factory.mktemp("pooling") / "tiny"
    save_checkpoint(Qwen3Config(**SIZES, tie_word_embeddings=True), path)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save_pretrained(path)
    return path


def open_llm(path: Path) -> LLM:
    """Steps of 32 tokens, so that the longer texts are read in chunks."""
    return LLM(str(path), dtype="float32", backend="eager", quiet=True, max_tokens=32,
               max_sequences=8)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return open_llm(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    """The same model behind a socket."""
    engine = open_llm(checkpoint)
    app = create_app(AsyncEngine(engine.engine), engine.tokenizer, "tiny",
                     read_embedder(checkpoint))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@torch.no_grad()
def embedding_of(model: torch.nn.Module, ids: list[int], dimensions: int | None = None
                 ) -> torch.Tensor:
    """Last token of the last hidden state, as the model card of Qwen3-Embedding has it."""
    last = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(last[:dimensions], dim=0)


@torch.no_grad()
def relevance_of(model: torch.nn.Module, tokenizer: object, query: str, text: str) -> float:
    """As the model card of Qwen3-Reranker has it."""
    prefix = ("<|im_start|>system\nJudge whether the Document meets the requirements based on the "
              'Query and the Instruct provided. Note that the answer can only be "yes" or "no".'
              "<|im_end|>\n<|im_start|>user\n")
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    task = "Given a web search query, retrieve relevant passages that answer the query"
    pair = f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {text}"
    ids = [i for part in (prefix, pair, suffix)
           for i in tokenizer.encode(part, add_special_tokens=False)]
    logits = model(torch.tensor([ids])).logits[0, -1]
    both = logits[tokenizer.convert_tokens_to_ids(["no", "yes"])]
    return float(both.log_softmax(0)[1].exp())


def test_embeddings_equal_transformers(llm: LLM, model: torch.nn.Module) -> None:
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    assert len(ids[-1]) > 64
    for vector, prompt in zip(llm.embed(TEXTS), ids, strict=True):
        torch.testing.assert_close(vector, embedding_of(model, prompt), atol=1e-5, rtol=0)
    (short,) = llm.embed(ids[0], dimensions=5)
    torch.testing.assert_close(short, embedding_of(model, ids[0], 5), atol=1e-5, rtol=0)
    assert len(short) == 5 and abs(float(short.norm()) - 1) < 1e-6


def test_embeddings_beside_generation(llm: LLM, model: torch.nn.Module) -> None:
    """One batch of both kinds gives what each gives alone."""
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    alone = [output.outputs[0].token_ids for output in llm.generate(ids, params)]
    prompts = [Prompt(i, p) for i in ids for p in (params, PoolingParams())]
    outputs = [result.outputs[0] for result in generate(llm.engine, prompts)]
    assert [output.token_ids for output in outputs[::2]] == alone
    for output, prompt in zip(outputs[1::2], ids, strict=True):
        vector = torch.nn.functional.normalize(output.vector, dim=0)
        torch.testing.assert_close(vector, embedding_of(model, prompt), atol=1e-5, rtol=0)
        assert output.token_ids == [] and output.finish_reason == "stop"


def test_a_prompt_may_fill_the_context(checkpoint: Path, model: torch.nn.Module) -> None:
    llm = LLM(str(checkpoint), dtype="float32", backend="eager", quiet=True, max_tokens=32,
              max_sequences=8, context_length=48)
    ids = list(range(5, 53))
    torch.testing.assert_close(llm.embed(ids)[0], embedding_of(model, ids), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="49 tokens; accepted: at most 48"):
        llm.embed(ids + [1])


def test_rerank_equals_transformers(llm: LLM, model: torch.nn.Module) -> None:
    query = "What is a stone?"
    want = [relevance_of(model, llm.tokenizer, query, text) for text in DOCUMENTS]
    assert max(want) - min(want) > 1e-3
    assert llm.rerank(query, DOCUMENTS) == pytest.approx(want, abs=1e-5)
    assert llm.rerank(query, DOCUMENTS, "Find nothing") != pytest.approx(want, abs=1e-4)


def test_openai_client_embeds(url: str, llm: LLM, model: torch.nn.Module) -> None:
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for given in (TEXTS, ids):
            for spelling in ({}, {"encoding_format": "float"}):  # the client's own is base64
                made = client.embeddings.create(model="tiny", input=given, **spelling)
                assert [item.index for item in made.data] == [0, 1, 2]
                assert made.usage.prompt_tokens == made.usage.total_tokens == sum(map(len, ids))
                for item, prompt in zip(made.data, ids, strict=True):
                    torch.testing.assert_close(
                        torch.tensor(item.embedding), embedding_of(model, prompt),
                        atol=1e-5, rtol=0)
        one = client.embeddings.create(model="tiny", input=TEXTS[1], dimensions=4)
        torch.testing.assert_close(torch.tensor(one.data[0].embedding),
                                   embedding_of(model, ids[1], 4), atol=1e-5, rtol=0)
        with pytest.raises(openai.BadRequestError, match="dimensions is 33; accepted: 1 to 32"):
            client.embeddings.create(model="tiny", input=TEXTS[1], dimensions=33)
    raw = httpx.post(f"{url}/v1/embeddings", json={"input": ids[0], "encoding_format": "base64"})
    spelled = base64.b64decode(raw.json()["data"][0]["embedding"])
    torch.testing.assert_close(torch.tensor(struct.unpack("<32f", spelled)),
                               embedding_of(model, ids[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_without_a_head(tmp_path: Path, tied: bool) -> None:
    """As Qwen3-Embedding is stored: the inner model alone, and the config of the whole."""
    config = Qwen3Config(**SIZES, tie_word_embeddings=tied)
    inner = Qwen3Model(config).eval()
    randomise(inner)
    inner.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    whole["architectures"] = ["Qwen3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(whole))
    kinds = ["Transformer", "1_Pooling", "2_Normalize"]
    (tmp_path / "modules.json").write_text(json.dumps(
        [{"type": "sentence_transformers.models." + kind.split("_")[-1], "path": kind}
         for kind in kinds]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    llm = open_llm(tmp_path)
    with torch.no_grad():
        last = inner(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
    torch.testing.assert_close(llm.embed([5, 6, 7])[0], torch.nn.functional.normalize(last, dim=0),
                               atol=1e-5, rtol=0)
    if tied:
        assert len(llm.generate([5, 6], SamplingParams(max_tokens=2))) == 1
    else:
        with pytest.raises(ValueError, match="no language head; accepted: embeddings"):
            llm.generate([5, 6])


def test_a_classifier_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    classifier = {"architectures": ["Qwen3ForSequenceClassification"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | classifier))
    with pytest.raises(CheckpointError, match="Qwen3ForSequenceClassification ends in a classif"):
        LLM(str(tmp_path / "model"), quiet=True)


def test_rerank_over_http(url: str, llm: LLM, model: torch.nn.Module) -> None:
    body = {"model": "tiny", "query": "What is a stone?", "documents": DOCUMENTS}
    want = [relevance_of(model, llm.tokenizer, body["query"], text) for text in DOCUMENTS]
    reply = httpx.post(f"{url}/v1/rerank", json=body).json()
    scores = [result["relevance_score"] for result in reply["results"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    for result in reply["results"]:
        assert result["relevance_score"] == pytest.approx(want[result["index"]], abs=1e-5)
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    assert reply["usage"]["total_tokens"] > 4 * 40
    objects = [{"text": text} for text in DOCUMENTS]
    few = httpx.post(f"{url}/v1/rerank", json={**body, "documents": objects, "top_n": 2,
                                               "return_documents": False}).json()
    assert [sorted(result) for result in few["results"]] == [["index", "relevance_score"]] * 2
    assert [r["index"] for r in few["results"]] == [r["index"] for r in reply["results"][:2]]
