"""A rounded export is judged by what it answers itself, and by the same questions as the original."""

import json

import pytest
import torch

from export.onnx_graph import export_onnx
from serving.engines.transformers import TransformersEngine
from serving.poc.answers import quality_of
from serving.poc.engine_quality import Job, run
from tests.command_line import sentei
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
