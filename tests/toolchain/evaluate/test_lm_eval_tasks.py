"""What lm-eval hands back is one number a question, or is refused before anything is computed."""

from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest

from toolchain.errors import SenteiError
from toolchain.evaluate import lm_eval_model
from toolchain.evaluate.lm_eval_tasks import LoadedTask, load_task, run_task
from toolchain.evaluate.task_requests import TaskRequest


def part(output_type: str, *metrics: str) -> SimpleNamespace:
    return SimpleNamespace(
        OUTPUT_TYPE=output_type,
        aggregation=lambda: dict.fromkeys(metrics),
        config=SimpleNamespace(output_type=output_type, num_fewshot=0, task_alias=None),
    )


def load(monkeypatch: pytest.MonkeyPatch, parts: dict[str, SimpleNamespace]) -> LoadedTask:
    manager = SimpleNamespace(all_tasks=["asked"], load=lambda names: {"tasks": parts})
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: manager)
    return load_task(TaskRequest(name="asked", file=None))


def run(monkeypatch: pytest.MonkeyPatch, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    monkeypatch.setattr(lm_eval_model, "ServedHFLM", lambda *_: SimpleNamespace(num_cut=0))
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **options: {"samples": samples})
    task = LoadedTask(label="asked", parts={name: part("generate_until") for name in samples}, manager=None)
    model: Any = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    return run_task(model, None, task, limit=None)  # type: ignore[arg-type]


def sample(number: int, filter_name: str, **scores: float) -> dict[str, Any]:
    return {
        "doc_id": number, "doc_hash": "", "doc": {}, "target": "4", "arguments": [("2 + 2 =", "")],
        "filter": filter_name, "filtered_resps": ["4"], "metrics": list(scores), **scores,
    }  # fmt: skip


def test_a_question_counts_once_however_many_ways_its_answer_is_read(monkeypatch: pytest.MonkeyPatch):
    samples = [sample(number, name, exact_match=float(name == "flexible")) for name in ("strict", "flexible")
               for number in (0, 1)]  # fmt: skip
    questions = run(monkeypatch, {"gsm8k": samples})["questions"]
    assert [question["id"] for question in questions] == [0, 1]
    assert [question["scores"] for question in questions] == [{"exact_match": 0.0}] * 2


def test_a_group_is_judged_by_a_metric_that_all_its_parts_have(monkeypatch: pytest.MonkeyPatch):
    samples = {"one": [sample(0, "none", acc_norm=1.0, acc=0.0)], "other": [sample(0, "none", acc=1.0)]}
    assert run(monkeypatch, samples)["metric"] == "acc"


def test_perplexity_on_text_is_refused_before_it_is_computed(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SenteiError, match=r"wikitext is perplexity on a text.*--text"):
        load(monkeypatch, {"wikitext": part("loglikelihood_rolling", "word_perplexity")})


def test_a_group_without_a_common_metric_is_refused_before_it_is_computed(monkeypatch: pytest.MonkeyPatch):
    parts = {"arc": part("multiple_choice", "acc", "acc_norm"), "gsm8k": part("generate_until", "exact_match")}
    with pytest.raises(SenteiError, match=r"arc \(acc, acc_norm\) and gsm8k \(exact_match\)"):
        load(monkeypatch, parts)
    assert load(monkeypatch, {"arc": parts["arc"], "piqa": part("multiple_choice", "acc")}).label == "asked"
