"""A rounded export is judged by what it answers itself, and by the same questions as the original."""

import json
import shutil
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from export.onnx_graph import export_onnx
from serving.engines.transformers import TransformersEngine
from serving.poc.answers import quality_of
from serving.poc.engine_quality import Job, run
from tests.command_line import sentei
from tests.conftest import make_pico
from toolchain.checkpoint.directory import copy_companions, open_checkpoint
from toolchain.errors import SenteiError
from toolchain.model.loading import load_tokenizer


@pytest.fixture(scope="module")
def asked(wide_model, tmp_path_factory):
    """A text, questions, and the original's evaluation on them."""
    place = tmp_path_factory.mktemp("asked")
    text, questions = place / "text.txt", place / "own.jsonl"
    text.write_text("The gardener prunes the trees in winter, and in summer they bear more fruit than before. " * 12)
    rows = [
        {"prompt": f"Tree {n} stands", "choices": [" tall", " still and green", " here"], "answer": n % 3,
         "subject": "odd" if n % 2 else "even"}
        for n in range(8)
    ]  # fmt: skip
    questions.write_text("\n".join(map(json.dumps, rows)) + "\n")
    out = place / "original"
    # A random model refuses nothing in words of anybody's list: a phrase is what it writes.
    first = TransformersEngine(wide_model, dtype=torch.float32).generate(
        load_tokenizer(wide_model)("Tree 0")["input_ids"], 4
    )
    open_rows = [
        {"prompt": f"Tree {n}", "refusal_phrases": [load_tokenizer(wide_model).decode(first)]} for n in range(4)
    ]
    (place / "open.jsonl").write_text("\n".join(map(json.dumps, open_rows)) + "\n")
    metrics = [
        f"f1:{questions}#class=here", f"accuracy:{questions}#group=odd",
        f"refusal_rate:{place / 'open.jsonl'}#wanted=refusals,tokens=4",
    ]  # fmt: skip
    done = sentei(
        "evaluate", wide_model, "--text", text, "--windows", 3, "--seq-len", 32, "--questions", questions, "-o", out,
        "--dtype", "float32", *(word for each in metrics for word in ("--metric", each)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Job(
        engine="onnx", model=str(wide_model), export="", original=str(out), out="", texts=[str(text)],
        questions=[str(questions)], metrics=metrics, chat_template=False,
    )  # fmt: skip


def test_an_export_that_rounds_nothing_answers_as_the_original_and_a_rounded_one_does_not(wide_model, asked, tmp_path):
    original = quality_of(tmp_path / asked.original, ["own.jsonl"])
    found = {}
    for precision in ("fp32", "int4"):
        export_onnx(wide_model, tmp_path / precision, precision=precision)
        out = tmp_path / f"quality-{precision}"
        run(asked.model_copy(update={"export": str(tmp_path / precision), "out": str(out)}))
        found[precision] = quality_of(out, ["own.jsonl"])
    ratio = found["fp32"].perplexity["text.txt"]
    assert ratio.value == pytest.approx(1, abs=1e-4)
    # Question by question, by the score that sentei evaluate gives, its groups included.
    assert found["fp32"].questions == original.questions
    assert {each.subject for each in original.questions} == {"odd", "even"}
    # So are the metrics, whether the model takes a choice or writes; their names are those of the files alone.
    assert found["fp32"].metrics == original.metrics
    refused = original.metrics["refusal_rate:open.jsonl#wanted=refusals,tokens=4"]
    assert refused.value >= 0.25 and len(original.metrics) == 3
    rounded = found["int4"].perplexity["text.txt"]
    assert abs(rounded.value - 1) > 100 * abs(ratio.value - 1)
    assert rounded.low < rounded.value < rounded.high


def test_another_text_than_the_originals_is_refused(wide_model, asked, tmp_path):
    export_onnx(wide_model, tmp_path / "onnx")
    other = tmp_path / "other.txt"
    other.write_text("In autumn the leaves fall from every tree of the garden, and nobody counts them any more. " * 12)
    job = asked.model_copy(
        update={"export": str(tmp_path / "onnx"), "out": str(tmp_path / "out"), "texts": [str(other)]}
    )
    with pytest.raises(SenteiError, match="not what the original was evaluated on"):
        run(job)
    assert not (tmp_path / "out").exists()


class FakeVllm(TransformersEngine):
    """Takes what vLLM takes: a prompt must leave room for one token in the length that the engine was started with."""

    name = "vllm"
    started: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, directory, *, max_model_len, options):
        super().__init__(directory, dtype=torch.float32)
        self.longest = min(max_model_len, open_checkpoint(directory).config["max_position_embeddings"])
        self.started.append((max_model_len, options["kv_cache_memory_bytes"]))

    def top_log_probabilities(self, prompts, k):
        assert max(map(len, prompts)) < self.longest
        return super().top_log_probabilities(prompts, k)

    def generate(self, prompt, max_new_tokens):
        assert len(prompt) + max_new_tokens <= self.longest
        return super().generate(prompt, max_new_tokens)


def with_context(model, directory, context):
    """The same model, said to read so many tokens."""
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return directory


@pytest.mark.parametrize("context", [32, 2**23])
def test_vllm_is_started_for_what_is_asked_and_not_for_the_whole_context(
    wide_model, asked, tmp_path, monkeypatch, context
):
    """A cache for the whole context takes gigabytes; and windows of the whole context leave vLLM no room."""
    monkeypatch.setattr("serving.engines.vllm.VllmEngine", FakeVllm)
    monkeypatch.setattr(FakeVllm, "started", [])
    model = with_context(wide_model, tmp_path / "model", context)
    out = tmp_path / "quality"
    run(asked.model_copy(update={"engine": "vllm", "model": str(model), "export": str(model), "out": str(out)}))
    [(longest, cache)] = FakeVllm.started
    assert longest == min(33, context)
    assert cache == 2**30
    found, original = quality_of(out, ["own.jsonl"]), quality_of(tmp_path / asked.original, ["own.jsonl"])
    # Of a window as long as the context, the last token is compared on neither side.
    assert found.perplexity["text.txt"].value == pytest.approx(1, abs=1e-4)
    assert found.questions == original.questions
    assert found.metrics == original.metrics


def test_the_cache_holds_the_longest_question(wide_model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.engines.vllm.VllmEngine", FakeVllm)
    monkeypatch.setattr(FakeVllm, "started", [])
    monkeypatch.setattr("serving.engines.vllm.KV_CACHE_BYTES", 1000)
    job = asked.model_copy(update={"engine": "vllm", "export": str(wide_model), "out": str(tmp_path / "quality")})
    run(job)
    [(longest, cache)] = FakeVllm.started
    # Keys and values of 2 heads of 32 numbers in 4 layers, and whole blocks.
    assert longest * 2 * 2 * 32 * 4 * 4 <= cache <= 256 * 2 * 2 * 32 * 4 * 4


@pytest.mark.acceptance
def test_the_real_vllm_starts_where_the_whole_context_takes_gigabytes(vllm, demo_model, asked, tmp_path):
    model, out = tmp_path / "model", tmp_path / "quality"
    make_pico(model, max_position_embeddings=131072, num_key_value_heads=4, head_dim=128)  # 16 KiB a token
    copy_companions(demo_model, model)
    questions = ["--questions", *asked.questions, *(word for each in asked.metrics for word in ("--metric", each))]
    done = sentei(
        "evaluate", model, "--text", *asked.texts, "--windows", 3, "--seq-len", 32, *questions, "-o", tmp_path / "own",
        "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = asked.model_copy(
        update={"engine": "vllm", "model": str(model), "export": str(model), "original": str(tmp_path / "own"),
                "out": str(out)}
    )  # fmt: skip
    command = [sys.executable, "-m", "serving.poc.engine_quality", job.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = quality_of(out, ["own.jsonl"])
    assert found.perplexity["text.txt"].value == pytest.approx(1, abs=1e-3)
    assert found.questions == quality_of(tmp_path / "own", ["own.jsonl"]).questions
