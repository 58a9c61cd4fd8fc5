"""The token before every text of a family that needs it: in windows, questions and prompts, and nowhere in the text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from export import quantize
from serving.verify.verify import _prompts
from tests.command_line import refused, sentei
from tests.conftest import prune_by_hand
from tests.families import make_family_pico
from toolchain.architecture.families import FAMILIES
from toolchain.checkpoint.directory import copy_companions, open_checkpoint
from toolchain.errors import SenteiError
from toolchain.evaluate import run as evaluation_run
from toolchain.evaluate import writing as damage
from toolchain.evaluate.lm_eval_tasks import load_task, run_task
from toolchain.evaluate.task_requests import TaskRequest
from toolchain.evaluate.text_overlap import find_overlap
from toolchain.heal import heal as healing
from toolchain.metrics.accuracy import ChoicesMetric
from toolchain.metrics.question_metrics import QuestionMetric
from toolchain.metrics.questions import Question, load_questions
from toolchain.metrics.token_metrics import measure
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import bos_of, load_model, load_tokenizer
from toolchain.plan.plan import load_plan
from toolchain.text.embedded import documents
from toolchain.text.passages import number_passages, worst_passages
from toolchain.text.sources import TextSource
from toolchain.text.windows import begin_with, load_mixture, load_windows

GEMMA = FAMILIES["gemma3_text"]
TEXT_LEN = 15
QUESTIONS = [
    {"prompt": "The capital of France is", "choices": ["Paris", "a very long and wrong answer"], "answer": 0},
    {"prompt": "日本の首都は", "choices": ["東京", "大阪です"], "answer": 1},
    *({"prompt": f"{n} and {n} make", "choices": [f"{2 * n} things", f"number {n}"], "answer": 0} for n in range(20)),
]


@pytest.fixture(scope="module")
def gemma(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3, whose tokenizer has a BOS token and does not put it in front by itself."""
    make_family_pico(directory := tmp_path_factory.mktemp("bos") / "gemma", GEMMA.model_type, "alternating",
                     vocab_size=49152)  # fmt: skip
    copy_companions(demo_model, directory)
    return directory


@pytest.fixture(scope="module")
def pruned(gemma: Path) -> Path:
    (directory := gemma.parent / "pruned").mkdir()
    prune_by_hand(gemma, directory, removed_attention={1}, width=lambda layer: 40 + layer)
    return directory


@pytest.fixture(scope="module")
def tokenizer(gemma: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(gemma)


@pytest.fixture(scope="module")
def bos(tokenizer: PreTrainedTokenizerBase) -> int:
    found = bos_of(GEMMA, tokenizer)
    assert found is not None
    assert found not in tokenizer("a")["input_ids"]
    return found


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bos") / "prose.jsonl"
    texts = [each[:450] for each in documents() if len(each) > 800][:6]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bos") / "questions.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    return path


def test_only_a_family_that_needs_it_has_it(tokenizer, bos: int):
    having = {name for name, family in FAMILIES.items() if bos_of(family, tokenizer) is not None}
    assert having == {"gemma3_text"}
    assert bos == tokenizer.bos_token_id


def test_a_tokenizer_without_it_is_one_sentence(gemma: Path, questions: Path, prose: Path, tmp_path: Path):
    make_family_pico(model := tmp_path / "model", GEMMA.model_type, "alternating", vocab_size=49152)
    copy_companions(gemma, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
    sentence = "need a BOS token before every text, and this tokenizer has none"
    done = sentei("prune", model, "-o", tmp_path / "out", "--sparsity", 0.3, "--align", 8, "--calibration", prose)
    refused(done, sentence)
    refused(sentei("evaluate", model, "--questions", questions), sentence)
    with pytest.raises(SenteiError, match="Set bos_token in tokenizer_config"):
        bos_of(GEMMA, load_tokenizer(model))


def test_each_window_begins_with_it_and_the_text_is_the_same(tokenizer, bos: int, prose: Path):
    plain = load_windows(prose, tokenizer, num_samples=6, seq_len=TEXT_LEN)
    windows = load_windows(prose, tokenizer, num_samples=6, seq_len=TEXT_LEN + 1, bos=bos)
    assert windows.ids.shape == (6, TEXT_LEN + 1)
    assert windows.ids[:, 0].tolist() == [bos] * 6
    assert bos not in windows.stretches[0]
    for text in (windows.ids[:, 1:], windows.text_ids, *windows.stretches, plain.text_ids, *plain.stretches):
        assert torch.equal(text, plain.ids)
    assert windows.passage_hashes.size > 0
    assert (windows.passage_hashes == plain.passage_hashes).all()
    assert windows.sha256 != plain.sha256
    with pytest.raises(SenteiError, match=r"and 9000 windows of 15 tokens need 135000"):
        load_windows(prose, tokenizer, num_samples=9000, seq_len=TEXT_LEN + 1, bos=bos)


def test_of_a_mixture_too(tokenizer, bos: int, prose: Path, text: Path):
    sources = [TextSource(prose, 0.75), TextSource(text, 0.25)]
    plain = load_mixture(sources, tokenizer, num_samples=8, seq_len=TEXT_LEN)
    windows = load_mixture(sources, tokenizer, num_samples=8, seq_len=TEXT_LEN + 1, bos=bos)
    assert torch.equal(windows.ids, begin_with(bos, plain.ids))
    assert torch.equal(windows.first_of_each, begin_with(bos, plain.first_of_each))
    assert (windows.passage_hashes == plain.passage_hashes).all()
    alone = load_windows(prose, tokenizer, num_samples=6, seq_len=TEXT_LEN + 1, bos=bos)
    assert windows.sources[0].sha256 == alone.sha256


def test_what_was_read_before_is_known_again_without_it(tokenizer, bos: int, prose: Path):
    plain = load_windows(prose, tokenizer, num_samples=None, seq_len=TEXT_LEN)
    windows = load_windows(prose, tokenizer, num_samples=None, seq_len=TEXT_LEN + 1, bos=bos)
    found, expected = (
        find_overlap(prose, each, tokenizer, "calibration", plain.passage_hashes) for each in (windows, plain)
    )
    assert found == expected
    assert (found.share, found.unit) == (1.0, "document")


def test_where_it_hurts_is_counted_in_tokens_of_the_text(tokenizer, bos: int, prose: Path):
    text_ids = load_windows(prose, tokenizer, num_samples=None, seq_len=TEXT_LEN + 1, bos=bos).text_ids
    unit, numbers = number_passages(prose, tokenizer, text_ids)
    assert unit == "document"
    original = torch.ones(text_ids.shape)
    worst = worst_passages(
        unit, numbers, text_ids, (original, original + numbers.eq(1)), tokenizer, count=2
    )  # the text's first token, after BOS, is predicted
    assert [(each.number, each.num_tokens) for each in worst] == [(1, int(numbers.eq(1).sum()))]
    assert worst[0].increase == pytest.approx(1)
    assert json.loads(prose.read_text().splitlines()[1])["text"].startswith(worst[0].excerpt[:40])


def test_questions_begin_with_it_once_and_keep_it(tokenizer, bos: int):
    def rows(prompt: str, seq_len: int, **more: Any) -> list[list[int]]:
        asked = [Question(prompt=prompt, choices=("one", "two"), answer=0)]
        return ChoicesMetric(
            asked, tokenizer, asked=QuestionMetric(kind="accuracy", file=Path("q")), seq_len=seq_len, **more
        ).ids.tolist()

    plain = rows("word " * 30 + "end", 64)
    assert rows("word " * 30 + "end", 64, bos=bos) == [[bos, *row] for row in plain]
    assert rows(f"{tokenizer.bos_token}word", 64, bos=bos) == rows("word", 64, bos=bos)
    assert rows("word " * 30 + "end", 16, bos=bos) == [[bos, *row[-15:]] for row in plain]


@torch.inference_mode()
def test_lm_eval_and_the_search_ask_alike(gemma: Path, tokenizer, bos: int, questions: Path):
    model = load_model(gemma)
    task = load_task(TaskRequest(name="questions", file=questions))
    answers = run_task(model, tokenizer, task, limit=None, bos=bos)["questions"]
    walk = LayerWalk(model, GEMMA)
    for question, answered in zip(load_questions(questions), answers, strict=True):
        metric = ChoicesMetric(
            [question], tokenizer, asked=QuestionMetric(kind="accuracy", file=Path("q")), seq_len=64, bos=bos
        )
        assert measure(walk, metric) == answered["scores"]["acc_norm"]
        for choice, found in zip(question.choices, answered["log_likelihoods"], strict=True):
            between = "" if question.prompt.endswith("は") else " "
            start = len(tokenizer(question.prompt)["input_ids"]) + 1
            ids = [bos, *tokenizer(question.prompt + between + choice)["input_ids"]]
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))
            assert found == pytest.approx(expected, abs=1e-3)
    assert tokenizer("a")["input_ids"][0] != bos  # the caller's own is left as it was


def test_an_evaluation_begins_texts_questions_and_prompts_with_it(
    gemma: Path, pruned: Path, tokenizer, bos: int, prose: Path, questions: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    prompts, asked = [], []

    def describe(model: Any, given: torch.Tensor) -> damage.Reference:
        prompts.append(given)
        return describe_original(model, given)

    def ask(*arguments: Any, **more: Any) -> dict[str, Any]:
        asked.append(more["bos"])
        return run_task(*arguments, **more)

    describe_original = damage.describe_original
    monkeypatch.setattr(damage, "describe_original", describe)
    monkeypatch.setattr(evaluation_run, "run_task", ask)
    done = sentei(
        "evaluate", pruned, "--against", gemma, "--text", prose, "--seq-len", TEXT_LEN + 1, "--windows", 5,
        "--questions", questions, "--generations", 2, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    windows = load_windows(prose, tokenizer, num_samples=5, seq_len=TEXT_LEN + 1, bos=bos)
    assert [each["text_sha256"] for each in found["evaluations"]] == [windows.sha256] * 2
    assert [each["num_tokens"] for each in found["evaluations"]] == [5 * TEXT_LEN] * 2
    assert asked == [bos, bos]
    stretches = damage.choose_prompts(windows.text_ids, 2)
    assert torch.equal(prompts[0], begin_with(bos, stretches))
    assert found["generation"]["prompt_tokens"] == damage.PROMPT_TOKENS
    assert [each["prompt"] for each in found["generation"]["samples"]] == tokenizer.batch_decode(stretches)


def test_a_plan_is_made_and_applied_with_it(
    gemma: Path, tokenizer, bos: int, prose: Path, questions: Path, tmp_path: Path
):
    done = sentei(
        "prune", gemma, "-o", tmp_path / "out", "--calibration", prose, "--samples", 4, "--seq-len", TEXT_LEN + 1,
        "--sparsity", 0.3, "--align", 8, "--attention-removals", 1, "--compensate", "--metric",
        f"accuracy:{questions}", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = load_plan(tmp_path / "out")
    windows = load_windows(prose, tokenizer, num_samples=4, seq_len=TEXT_LEN + 1, bos=bos)
    assert plan.document.calibration.sha256 == windows.sha256
    assert (plan.text_hashes["calibration"] == windows.passage_hashes).all()
    metric = ChoicesMetric(
        load_questions(questions),
        tokenizer,
        asked=QuestionMetric(kind="accuracy", file=Path("q")),
        seq_len=TEXT_LEN + 1,
        bos=bos,
    )
    assert plan.document.metric_original == measure(LayerWalk(load_model(gemma), GEMMA), metric)
    assert plan.document.calibration.bos == bos
    content = json.loads((tmp_path / "out" / "plan.json").read_text())
    del content["calibration"]["bos"], content["calibration"]["chat_template"]  # as earlier versions wrote it
    (tmp_path / "out" / "plan.json").write_text(json.dumps(content))
    done = sentei("apply", tmp_path / "out", gemma, "-o", tmp_path / "again", "--calibration", prose, "--quiet")
    assert done.returncode == 0, done.stderr


def test_healing_quantising_and_verifying_read_with_it(
    gemma: Path, bos: int, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = torch.tensor(_prompts(open_checkpoint(gemma), prose, long=False))
    assert prompts[:, 0].tolist() == [bos] * len(prompts)

    given: list[torch.Tensor] = []

    def stop(*arguments: Any, windows: torch.Tensor | None = None, **more: Any) -> Any:
        given.append(arguments[0].ids if windows is None else windows)
        raise SenteiError("Read.")

    done = sentei(
        "prune", gemma, "-o", tmp_path / "out", "--calibration", prose, "--samples", 2, "--seq-len", TEXT_LEN + 1,
        "--sparsity", 0.3, "--align", 8, "--attention-removals", 1, "--no-compensate", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(healing, "_num_held_out", stop)
    refused(sentei("heal", tmp_path / "out", "--against", gemma, "--data", prose, "-o", tmp_path / "healed",
                   "--steps", 2, "--batch-size", 2, "--seq-len", TEXT_LEN + 1), "Read.")  # fmt: skip
    monkeypatch.setattr(quantize, "find_python", lambda: "python")
    monkeypatch.setattr(quantize, "quantize", stop)
    refused(sentei("quantize", gemma, "-o", tmp_path / "small", "--scheme", "w4a16", "--calibration", prose,
                   "--samples", 2, "--seq-len", TEXT_LEN + 1), "Read.")  # fmt: skip
    assert [each[:, 0].unique().tolist() for each in given] == [[bos], [bos]]
    assert [each.shape[1] for each in given] == [TEXT_LEN + 1] * 2
