"""The report's section on tasks and generation."""

import pytest

from serving.report.render import render_report
from tests.serving.report.test_render import page_text, write, write_plan, write_summary
from toolchain.errors import SenteiError
from toolchain.evaluate.comparison import compare_task, mean_score, perplexity_ratio, share
from toolchain.evaluate.document import (
    EvaluationDocument,
    GenerationComparison,
    MetricResult,
    Sample,
    Share,
    TaskResult,
    TextComparison,
    TextResult,
    WorsePassage,
)
from toolchain.evaluate.own_metrics import compare, parse_metrics

EVIL = "<img src=x onerror='alert(1)'>"


def document() -> EvaluationDocument:
    sides = ("original", "pruned")
    scores = {"original": [1.0] * 12, "pruned": [0.0] * 9 + [1.0] * 3}
    questions = {
        side: [
            {"id": n, "subject": EVIL, "question": f"{EVIL} {n}", "choices": [f"right{EVIL}", "wrong"], "answer": 0,
             "log_likelihoods": [-1.0, -2.0] if right else [-2.5, -1.0], "scores": {"acc": right}}
            for n, right in enumerate(scores[side])
        ]
        for side in sides
    }  # fmt: skip
    known = Share(value=0.625, low=0.5, high=0.75)
    return EvaluationDocument(
        evaluations=[
            TextResult(model=side, directory="d", text="t.txt", text_sha256="00", perplexity=value, standard_error=1.0,
                       num_tokens=10, num_windows=3, seq_len=5)
            for side, value in zip(sides, (20.0, 30.0), strict=True)
        ],
        tasks=[
            TaskResult(model=side, directory="d", task=f"mine{EVIL}", source="mine.jsonl", num_fewshot=0,
                       num_questions=12, metric="acc", score=share(scores[side]), scores={"acc": 0.5}, duration_s=1.0)
            for side in sides
        ],
        text_comparisons=[
            TextComparison(
                text="t.txt", perplexity_ratio=perplexity_ratio([3.0, 3.1, 2.9], [3.4, 3.5, 3.35]),
                worst_passages=[WorsePassage(unit="document", number=7, num_tokens=40, original_loss=3.0,
                                             pruned_loss=4.25, excerpt=EVIL)],
            )
        ],
        task_comparisons=[compare_task(f"mine{EVIL}", "acc", questions["original"], questions["pruned"])],
        mean_score=mean_score([(scores["original"], scores["pruned"])] * 2),
        generation=GenerationComparison(
            text="t.txt", num_prompts=2, prompt_tokens=32, max_new_tokens=64, repetition_original=0.1,
            repetition_pruned=0.4, repetition_change=None, distinct_1_original=0.5, distinct_1_pruned=0.3,
            distinct_2_original=0.75, distinct_2_pruned=0.25, token_agreement=known, kl_divergence=known,
            common_prefix_tokens=3.5, samples=[Sample(prompt=EVIL, original="once", pruned=EVIL)], duration_s=1.0,
        ),
    )  # fmt: skip


def test_what_changed_and_where_is_on_the_page(tmp_path):
    document().save(tmp_path)
    render_report([tmp_path], tmp_path / "report.html")
    text = page_text(tmp_path / "report.html")
    for expected in (
        "1.52 times the original’s", "−75.0", "9, 0", "0.004", ">worse</span>", "25.0 % of the original’s mean",
        "62.5 (50.0 to 75.0) %", "0.750 → 0.250", "3.5 of 64 tokens", "+1.00 → −1.50", "document 7", "3.00 → 4.25",
    ):  # fmt: skip
        assert expected in text, expected
    assert "<img" not in text
    assert "&lt;img src=x" in text


def test_an_evaluation_of_one_model_has_no_comparison(tmp_path):
    alone = document().model_copy(
        update={"text_comparisons": [], "task_comparisons": [], "mean_score": None, "generation": None}
    )
    alone.save(tmp_path)
    render_report([tmp_path], tmp_path / "report.html")
    assert "Where it hurts" not in page_text(tmp_path / "report.html")


def test_a_file_that_does_not_follow_the_schema(tmp_path):
    written = document().model_dump()
    written["task_comparisons"][0]["surprise"] = 1
    write(tmp_path, "evaluation.json", written)
    with pytest.raises(SenteiError, match="does not have the fields it should"):
        render_report([tmp_path], tmp_path / "report.html")


def test_how_a_task_was_asked_stands_beside_its_score(tmp_path):
    asked = document()
    tasks = [
        task.model_copy(update={"num_fewshot": 5, "fewshot_source": "train.jsonl", "chat_template": True})
        for task in asked.tasks
    ]
    asked.model_copy(update={"tasks": tasks}).save(tmp_path)
    render_report([tmp_path], tmp_path / "report.html")
    text = page_text(tmp_path / "report.html")
    assert "<code>acc, 5 examples, in the chat template</code>" in text
    assert "Mean score of the tasks (5 examples, in the chat template)" in text
    render_report([tmp_path], tmp_path / "report.md")
    assert "(acc, 5 examples, in the chat template)" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_metrics_of_ones_own_questions_stand_among_the_tasks(tmp_path):
    name = f"refusal_rate:own.jsonl#group=a|b{EVIL},wanted=answers"
    (asked,) = parse_metrics([name])
    outcomes = {"original": [False] * 20, "pruned": [True] * 12 + [False] * 8}
    metrics = [
        MetricResult(model=side, directory="d", metric=name, source="own.jsonl", questions_sha256="0",
                     higher_is_better=False, num_questions=20, num_counted=20, max_new_tokens=32, bos=None,
                     chat_template=True, duration_s=1.0, score=share([float(each) for each in outcomes[side]]))
        for side in ("original", "pruned")
    ]  # fmt: skip
    found = document().model_copy(
        update={"metrics": metrics, "metric_comparisons": [compare(asked, outcomes["original"], outcomes["pruned"])]}
    )
    found.save(tmp_path)
    render_report([tmp_path], tmp_path / "report.html")
    row = next(each for each in page_text(tmp_path / "report.html").split("<tr>") if "refusal_rate" in each)
    assert "own.jsonl" in row and "wanted=answers, in the chat template" in row
    # It refuses 60 % more where answers are wanted: higher, and worse.
    assert ">+60.0<" in row and ">worse</span>" in row
    assert "<img" not in row
    render_report([tmp_path], tmp_path / "report.md")
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    (line,) = [each for each in table.splitlines() if "refusal_rate" in each]
    assert line.replace("\\|", "").count("|") == 8


def one_side(side: str, **read) -> EvaluationDocument:
    whole = document()
    texts = [each.model_copy(update=read) for each in whole.evaluations if each.model == side]
    return EvaluationDocument(evaluations=texts)


@pytest.mark.parametrize("read", [{"seq_len": 6}, {"text_sha256": "01"}, {"num_windows": 2}, {"bos": 1}])
def test_perplexities_of_other_windows_are_not_compared(tmp_path, read):
    write_summary(tmp_path)
    for name, found in (("one", one_side("original")), ("other", one_side("pruned", **read))):
        (tmp_path / name).mkdir()
        found.save(tmp_path / name)
    render_report([tmp_path], tmp_path / "report.html")
    text = page_text(tmp_path / "report.html")
    assert "The two models read t.txt in different ways, so its perplexities are not compared." in text
    assert "on t.txt" not in text

    one_side("pruned").save(tmp_path / "other")
    render_report([tmp_path], tmp_path / "alike.html")
    text = page_text(tmp_path / "alike.html")
    assert "20 → 30, on t.txt." in text
    assert "in different ways" not in text


@pytest.mark.parametrize(
    ("language", "said"), [("en", "No text was evaluated with both models"), ("ja", "両モデルで評価したテキスト")]
)
@pytest.mark.parametrize("name", ["report.html", "report.md"])
@pytest.mark.parametrize("planned", [False, True])
def test_questions_are_reported_without_a_text_too(tmp_path, language, said, name, planned):
    (tmp_path / "evaluation").mkdir()
    alone = document().model_copy(update={"evaluations": [], "text_comparisons": [], "generation": None})
    alone.save(tmp_path / "evaluation")
    if planned:
        write_plan(tmp_path)
    render_report([tmp_path], tmp_path / name, language=language)
    text = page_text(tmp_path / name)
    assert "25.0 (" in text and "−75.0" in text
    assert said in text and "evaluation.json" not in text


def test_each_test_that_a_row_was_judged_by_is_named(tmp_path):
    (asked,) = parse_metrics(["f1:own.jsonl#class=a"])
    outcomes = {"original": [True] * 20, "pruned": [True] * 9 + [False] * 11}
    metrics = [
        MetricResult(model=side, directory="d", metric=asked.label, source="own.jsonl", questions_sha256="0",
                     higher_is_better=True, num_questions=20, num_counted=20, max_new_tokens=None, bos=None,
                     chat_template=False, duration_s=1.0, score=share([float(each) for each in outcomes[side]]))
        for side in ("original", "pruned")
    ]  # fmt: skip
    document().model_copy(
        update={"metrics": metrics, "metric_comparisons": [compare(asked, outcomes["original"], outcomes["pruned"])]}
    ).save(tmp_path)
    named = {
        "en": "(exact McNemar test, paired t-test of jackknife values of the questions, normal test of",
        "ja": "（正確マクネマー検定, 問題ごとのジャックナイフ値の対応のある t 検定, タスクごとの",
    }
    for language, tests in named.items():
        render_report([tmp_path], tmp_path / f"{language}.html", language=language)
        assert tests in page_text(tmp_path / f"{language}.html")
