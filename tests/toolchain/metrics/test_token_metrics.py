"""Metrics: each against a computation of its own, on the real model; and what a person can get wrong."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from tests.command_line import PLAIN, refused, sentei
from tests.conftest import prune_by_hand
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.metrics.accuracy import ChoicesMetric
from toolchain.metrics.choose import choose_metric
from toolchain.metrics.question_metrics import QuestionMetric
from toolchain.metrics.questions import Question
from toolchain.metrics.token_metrics import measure
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.plan.plan import load_plan

QUESTIONS = [
    {"prompt": "The capital of France is", "choices": ["Paris", "a kind of cheese from Italy"], "answer": 0},
    {"prompt": "Question: Which animal barks?\nAnswer:", "choices": [" a cat", " a dog", " a fish"], "answer": 1},
    {"prompt": "日本の首都は", "choices": ["東京です。", "バナナです。"], "answer": 0},
    {"prompt": "Two plus two equals", "choices": ["seventeen", "four"], "answer": 1},
    {"prompt": "Water is made of hydrogen and", "choices": ["oxygen", "sand", "wood"], "answer": 2},
]
SETTINGS = ("--sparsity", 0.3, "--samples", 2, "--seq-len", 64, "--align", 8, "--attention-removals", 1, *PLAIN)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("\n".join(json.dumps(question) for question in QUESTIONS) + "\n\n")
    return path


@pytest.fixture(scope="module")
def ids(demo_model: Path) -> torch.Tensor:
    text = "Pruning a tree in winter lets it bear more fruit in summer, if it is done with care. " * 4
    return torch.tensor([load_tokenizer(demo_model)(text)["input_ids"][:48]])


def walk_over(directory: Path) -> LayerWalk:
    checkpoint = open_checkpoint(directory)
    return LayerWalk(load_model(checkpoint, dtype=torch.float32), checkpoint.family)


@torch.inference_mode()
def logits_of(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    return load_model(directory, dtype=torch.float32)(ids).logits.double()


def test_kl_is_the_divergence_from_the_original(demo_model: Path, pruned_demo: Path, ids: torch.Tensor):
    metric = choose_metric("kl", ids, load_tokenizer(demo_model))
    metric.prepare(walk_over(demo_model))
    assert measure(walk_over(demo_model), metric) == pytest.approx(0, abs=1e-6)
    before, after = (log_softmax(logits_of(directory, ids)[0], -1) for directory in (demo_model, pruned_demo))
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    assert measure(walk_over(pruned_demo), metric) == pytest.approx(expected, rel=1e-4)


def test_blocks_of_the_vocabulary_change_nothing(demo_model: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    walk, metric = walk_over(demo_model), choose_metric("perplexity", ids, load_tokenizer(demo_model))
    expected = measure(walk, metric)
    direct = -log_softmax(logits_of(demo_model, ids)[0, :-1], -1).gather(1, ids[0, 1:, None]).mean()
    assert expected == pytest.approx(math.exp(direct), rel=1e-5)
    for num_logits, num_tokens in ((1, 2048), (100_000, 2048), (100_000, 7)):
        monkeypatch.setattr("toolchain.model.layer_walk._HEAD_LOGITS", {"cpu": num_logits * 48 // num_tokens or 4800})
        monkeypatch.setattr("toolchain.model.layer_walk._HEAD_TOKENS", num_tokens)
        assert measure(walk, metric) == pytest.approx(expected, rel=1e-6)


def test_accuracy_is_that_of_scores_per_character(demo_model: Path, questions: Path):
    tokenizer, model = load_tokenizer(demo_model), load_model(demo_model, dtype=torch.float32)
    right = []
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            between = "" if choice[0] == " " or question["prompt"][-1] == "は" else " "
            prompt = tokenizer(question["prompt"])["input_ids"]
            whole = tokenizer(question["prompt"] + between + choice)["input_ids"]
            with torch.inference_mode():
                logs = log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            total = sum(float(logs[place - 1, whole[place]]) for place in range(len(prompt), len(whole)))
            scores.append(total / len(choice))
        right.append(scores.index(max(scores)) == question["answer"])
    metric = choose_metric(f"accuracy:{questions}", torch.zeros(1, 64), tokenizer)
    assert measure(walk_over(demo_model), metric) == sum(right) / len(right)
    assert 0 < sum(right) < len(right)


def test_long_prompts_lose_their_beginning(demo_model: Path):
    tokenizer = load_tokenizer(demo_model)
    question = Question(prompt="word " * 100 + "end", choices=("one", "two"), answer=0)
    metric = ChoicesMetric([question], tokenizer, asked=QuestionMetric(kind="accuracy", file=Path("q")), seq_len=16)
    assert metric.ids.shape[1] <= 16
    whole = tokenizer(question.prompt + " one")["input_ids"]
    assert metric.ids[0].tolist() == whole[-16:]
    with pytest.raises(SenteiError, match="question 1: a choice has"):
        ChoicesMetric(
            [Question(prompt="a", choices=("word " * 50, "b"), answer=0)],
            tokenizer,
            asked=QuestionMetric(kind="accuracy", file=Path("q")),
            seq_len=16,
        )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 1 is not readable JSON"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "line 1 is not a JSON object with prompt, choices and answer"),
        ('{"prompt": "", "choices": ["b", "c"], "answer": 0}', "prompt must be a text"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "two texts or more"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "0 to 1"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "b"}', "0 to 1"),
        ("", "holds no question"),
    ],
)
def test_bad_questions(pico_model: Path, tmp_path: Path, line: str, sentence: str):
    (tmp_path / "questions.jsonl").write_text(line)
    metric = f"accuracy:{tmp_path / 'questions.jsonl'}"
    refused(sentei("prune", pico_model, "-o", tmp_path / "out", *SETTINGS, "--metric", metric), sentence)
    assert not (tmp_path / "out").exists()


FUNCTIONS = """
import torch

def size_of_logits(model, tokenizer):
    with torch.inference_mode():
        return float(model(torch.arange(20)[None]).logits.abs().mean())

def worst(model, tokenizer):
    return -size_of_logits(model, tokenizer)
worst.higher_is_better = True

def raises(model, tokenizer):
    raise ValueError("no such table")

def nothing(model, tokenizer): return None
def nan(model, tokenizer): return float("nan")
def constant(model, tokenizer): return 1
number = 3
"""


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_metrics.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_metrics"


def test_a_function_of_ones_own_decides(pico_model: Path, tmp_path: Path, own_metrics: str):
    plans = []
    for function in ("size_of_logits", "worst"):
        done = sentei(
            "prune", pico_model, "-o", tmp_path / function, *SETTINGS, "--metric", f"{own_metrics}:{function}"
        )
        assert done.returncode == 0, done.stderr
        plans.append(load_plan(tmp_path / function))
    lower, higher = (plan.document for plan in plans)
    assert lower.metric == f"{own_metrics}:size_of_logits"
    assert (lower.metric_higher_is_better, higher.metric_higher_is_better) == (False, True)
    assert lower.trace[0].metric == min(lower.trace[0].candidates.values())
    assert lower.trace[0].removed == higher.trace[0].removed
    assert lower.metric_original == -higher.metric_original
    model = load_model(pico_model, dtype=torch.float32)
    with torch.inference_mode():
        assert lower.metric_original == pytest.approx(float(model(torch.arange(20)[None]).logits.abs().mean()))


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        ("own_metrics:raises", "raised ValueError: no such table (own_metrics.py line 13)"),
        ("own_metrics:nothing", "returned None, which is not a number"),
        ("own_metrics:nan", "returned nan"),
        ("own_metrics:constant", "cannot tell them apart"),
        ("own_metrics:number", "is not a function"),
        ("own_metrics:missing", "has no function 'missing'"),
        ("no_such_module:f", "cannot be imported"),
        ("bleu", "'bleu' is not known"),
        ("accuracy", "needs questions"),
        ("accuracy:nowhere.jsonl", "does not exist"),
    ],
)
def test_bad_metrics(pico_model: Path, tmp_path: Path, own_metrics: str, metric: str, sentence: str):
    refused(sentei("prune", pico_model, "-o", tmp_path / "out", *SETTINGS, "--metric", metric), sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--metric", "own_metrics:worst", "--offload"), "needs the whole model"),
        (("--metric", "own_metrics:worst", "--search", "racing"), "cannot race"),
        (("--metric", "own_metrics:worst", "--max-metric", 1), "higher is better"),
        (("--metric", "own_metrics:worst", "--max-degradation", 1.1), "no multiple of it is a limit"),
        (("--min-metric", 1), "lower is better"),
        (("--metric", "kl", "--max-degradation", 1.1), "no multiple of it is a limit"),
        (("--max-metric", 99, "--max-degradation", 1.1), "Two limits"),
        (("--limit-metric", "kl"), "needs a limit"),
    ],
)
def test_combinations_that_make_no_sense(
    pico_model: Path, tmp_path: Path, own_metrics: str, options: tuple[object, ...], sentence: str
):
    refused(sentei("prune", pico_model, "-o", tmp_path / "out", *SETTINGS, *options), sentence)


def test_searched_by_one_metric_and_stopped_by_another(demo_model: Path, questions: Path, tmp_path: Path):
    settings = ("--sparsity", 0.3, "--samples", 2, "--seq-len", 64, "--attention-removals", 3, *PLAIN)
    limit = ("--limit-metric", f"accuracy:{questions}", "--min-metric", 0.4)
    done = sentei("prune", demo_model, "-o", tmp_path / "out", *settings, "--metric", "kl", *limit)
    assert done.returncode == 0, done.stderr
    document = load_plan(tmp_path / "out").document
    assert document.limit is not None
    assert (document.metric, document.limit.metric, document.limit.source) == ("kl", "accuracy", "questions.jsonl")
    limited = [step.limit_metric for step in (*document.stage_1, *document.trace)]
    assert limited
    assert all(value is not None and value >= 0.4 for value in limited)
    assert document.stopped_because is not None
    assert document.stopped_because.startswith("accuracy would be")
    pruned = choose_metric(f"accuracy:{questions}", torch.zeros(1, 64), load_tokenizer(demo_model))
    assert measure(walk_over(tmp_path / "out"), pruned) == limited[-1]


def test_metrics_agree_on_a_model_without_attention_or_with_it_masked(
    demo_model: Path, ids: torch.Tensor, tmp_path: Path
):
    (tmp_path / "without").mkdir()
    prune_by_hand(demo_model, tmp_path / "without", removed_attention={3, 7}, width=lambda layer: 1536)
    metric = choose_metric("perplexity", ids, load_tokenizer(demo_model))
    masked = measure(walk_over(demo_model), metric, without_attention=(7, 3))
    assert masked == pytest.approx(measure(walk_over(tmp_path / "without"), metric), rel=1e-6)
