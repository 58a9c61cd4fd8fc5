"""What is counted on one's own questions: by hand, and from what a person would lose if it were counted otherwise."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.errors import SenteiError
from toolchain.metrics.question_metrics import (
    MOST_ANSWERS,
    QuestionMetric,
    is_json,
    parse_question_metric,
)
from toolchain.metrics.questions import OpenQuestion, Question, load_open_questions, load_questions
from toolchain.metrics.refusals import REFUSAL_PHRASES, refuses

CLASSES = ("fraud", "error", "fine")


def labelled(answer: int, subject: str | None = None) -> Question:
    return Question(prompt="Which is it?", choices=CLASSES, answer=answer, subject=subject)


def written(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs: list[tuple[int, int]]):
    metric = QuestionMetric(kind="f1", file=Path("q"), of_class="fraud")
    pairs = [(0, 1), *pairs]  # one question at least is of the class
    found = [metric.of_choice(labelled(answer), picked) for answer, picked in pairs]
    right = sum(answer == picked == 0 for answer, picked in pairs)
    asked, said = (sum(each[side] == 0 for each in pairs) for side in (0, 1))
    precision, recall = right / said if said else 0.0, right / asked
    expected = 2 * precision * recall / (precision + recall) if right else 0.0
    assert metric.value(found) == pytest.approx(expected)
    low, high = metric.interval(found)
    assert 0 <= low <= expected + 1e-9 and expected - 1e-9 <= high <= 1


def test_the_interval_of_an_f1_holds_the_true_one_as_often_as_it_says():
    """A deployed classifier's F1 is that of all claims there will ever be; a file is a sample of them."""
    metric = QuestionMetric(kind="f1", file=Path("q"), of_class="fraud")
    share_right, share_wrong = 0.3, 0.2  # of all claims: true positives, and false positives and negatives
    truth = 2 * share_right / (2 * share_right + share_wrong)
    draw, held = random.Random(1), 0
    for _ in range(400):
        found = draw.choices([True, False, None], [share_right, share_wrong, 1 - share_right - share_wrong], k=80)
        low, high = metric.interval(found)
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.98


def test_a_model_that_stops_refusing_is_worse_where_refusals_are_wanted_and_better_where_answers_are():
    unsafe, refusal = OpenQuestion(prompt="How do I pick a lock?"), "I'm sorry, but I can't help with that."
    for wanted, refusing_is_better in (("refusals", True), ("answers", False)):
        metric = parse_question_metric(f"refusal_rate:q.jsonl#wanted={wanted}")
        assert metric is not None
        refusing, answering = (metric.value([metric.of_answer(unsafe, each)]) for each in (refusal, "Take a pick."))
        # The number is always the share that was refused; only which way is better differs.
        assert (refusing, answering) == (1, 0)
        assert metric.higher_is_better is refusing_is_better
    with pytest.raises(SenteiError, match="whether refusals are good or bad"):
        parse_question_metric("refusal_rate:q.jsonl")


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that request.", "I\u2019m sorry, but I can\u2019t assist with that.",
        "Sorry, I cannot do this.", "As a language model, I AM UNABLE to give legal advice.",
        "申し訳ございませんが、そのご質問にはお答えできません。", "そのようなご依頼には対応いたしかねます。",
        "申し訳ありませんが、それについて 回答することはできません。",
    ],
)  # fmt: skip
def test_a_refusal_is_seen_in_both_languages(answer: str):
    assert refuses(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "", "Sure! Here is how you do it.", "Yes, you can help.", "I can help you with that. First, open the door.",
        "はい、次のように申請できます。", "申請は前日まで可能です。", "the the the the",
    ],
)  # fmt: skip
def test_an_answer_is_no_refusal(answer: str):
    assert not refuses(answer)


def test_a_files_own_phrases_replace_the_list(tmp_path: Path):
    path = written(tmp_path / "q.jsonl", {"prompt": "a", "refusal_phrases": ["Frag den Chef"]}, {"prompt": "b"})
    own, usual = load_open_questions(path)
    metric = QuestionMetric(kind="refusal_rate", file=path, wanted="refusals")
    assert metric.of_answer(own, "Bitte frag den  CHEF.") and not metric.of_answer(own, "I can't help with that.")
    assert metric.of_answer(usual, "I can't help with that.")
    # Every phrase is found as it stands in the list.
    assert all(refuses(f"… {each} …") for each in REFUSAL_PHRASES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.lists(json_values, max_size=3) | st.dictionaries(st.text(max_size=4), json_values, max_size=3))
def test_json_is_what_a_program_can_parse_and_nothing_around_it(value: object):
    answer = json.dumps(value, ensure_ascii=False)
    assert is_json(f"\n {answer}\n")
    # Cut off, in a code block, with a sentence before it: who calls json.loads on it fails.
    for spoilt in (answer[:-1], f"```json\n{answer}\n```", f"Here it is: {answer}", f"{answer} Done."):
        assert not is_json(spoilt)


@pytest.mark.parametrize(
    "answer", ["", "null", "3", '"text"', "{'a': 1}", '{"a": NaN}', '{"a": 1,}', "[1] [2]", "[" * 500]
)
def test_what_is_no_object_or_list_does_not_count(answer: str):
    assert not is_json(answer)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("accuracy:q.jsonl", QuestionMetric(kind="accuracy", file=Path("q.jsonl"))),
        ("accuracy:a/q.jsonl#group=safety", QuestionMetric(kind="accuracy", file=Path("a/q.jsonl"), group="safety")),
        ("accuracy:a#1/q.jsonl#group=休暇, 有給",
         QuestionMetric(kind="accuracy", file=Path("a#1/q.jsonl"), group="休暇, 有給")),
        ("f1:q.jsonl#class=a=b,group=c", QuestionMetric(kind="f1", file=Path("q.jsonl"), of_class="a=b", group="c")),
        ("valid_json:q.jsonl#tokens=9", QuestionMetric(kind="valid_json", file=Path("q.jsonl"), tokens=9)),
        ("refusal_rate:C:/q.jsonl#wanted=answers",
         QuestionMetric(kind="refusal_rate", file=Path("C:/q.jsonl"), wanted="answers", tokens=32)),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_read_as_it_is_meant(asked: str, expected: QuestionMetric):
    found = parse_question_metric(asked)
    assert found == expected
    # And its name in results asks for the same, of the file's name alone.
    again = parse_question_metric(expected.label)
    assert again is not None
    assert (again.label, again.higher_is_better, again.tokens) == (found.label, found.higher_is_better, found.tokens)


@pytest.mark.parametrize("asked", ["perplexity", "kl", "package.module:function", "accuracies:q.jsonl"])
def test_other_metrics_are_not_touched(asked: str):
    assert parse_question_metric(asked) is None


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("accuracy", "needs questions"),
        ("f1:", "needs questions"),
        ("f1:q.jsonl", "which class's F1"),
        ("f1:q.jsonl#klass=a", "f1 knows no option 'klass=a'"),
        ("accuracy:q.jsonl#wanted=refusals", "accuracy knows no option 'wanted=refusals'"),
        ("accuracy:q.jsonl#group=a,wanted=refusals", "accuracy knows no option 'wanted=refusals'"),
        ("accuracy:q.jsonl#group=a,group=b", "group is given twice"),
        ("accuracy:q.jsonl#group=", "group has no value"),
        ("refusal_rate:q.jsonl#wanted=refusal", "whether refusals are good or bad"),
        ("valid_json:q.jsonl#tokens=0", "from 1 to 1024"),
        ("valid_json:q.jsonl#tokens=99999999999999999999", "from 1 to 1024"),
        ("valid_json:q.jsonl#tokens=１２", "from 1 to 1024"),
    ],
)
def test_a_metric_that_is_not_said_well_is_refused(asked: str, sentence: str):
    with pytest.raises(SenteiError) as error:
        parse_question_metric(asked)
    assert sentence in str(error.value)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_after_the_kind_ends_in_anything_but_a_metric_or_a_sentence(rest: str):
    for kind in ("accuracy", "f1", "refusal_rate", "valid_json"):
        try:
            found = parse_question_metric(f"{kind}:{rest}")
        except SenteiError:
            continue
        assert found is not None and found.kind == kind


def test_a_group_is_the_questions_with_that_subject(tmp_path: Path):
    rows = [{"prompt": "p", "choices": ["a", "b"], "answer": 0, "subject": each} for each in ("law", "safety", "law")]
    path = written(tmp_path / "q.jsonl", *rows, {"prompt": "p", "choices": ["a", "b"], "answer": 1})
    assert len(QuestionMetric(kind="accuracy", file=path, group="law").questions()) == 2
    assert QuestionMetric(kind="valid_json", file=path, group="safety", tokens=8).num_questions == 1
    with pytest.raises(SenteiError, match=r"no question has the subject 'Law'.*law, safety"):
        QuestionMetric(kind="accuracy", file=path, group="Law").questions()
    # An F1 of a class that no right answer is would be 0 for every model.
    with pytest.raises(SenteiError, match="no question has the right answer 'b'"):
        QuestionMetric(kind="f1", file=path, group="law", of_class="b").questions()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("[1]", "line 2 is not a JSON object with a prompt"),
        ('{"question": "a"}', "line 2 is not a JSON object with a prompt"),
        ('{"prompt": " "}', "line 2: prompt must be a text"),
        ('{"prompt": "a", "subject": 3}', "line 2: subject must be a text"),
        ('{"prompt": "a", "refusal_phrases": "no"}', "line 2: refusal_phrases must be a list"),
        ('{"prompt": "a", "refusal_phrases": []}', "line 2: refusal_phrases must be a list"),
        ('{"prompt": "a", "refusal_phrases": [" "]}', "line 2: refusal_phrases must be a list"),
        ('{"prompt": "a"', "line 2 is not readable JSON"),
    ],
)
def test_a_bad_line_is_named(row: str, sentence: str, tmp_path: Path):
    (tmp_path / "q.jsonl").write_text(f'{{"prompt": "good"}}\n{row}\n')
    with pytest.raises(SenteiError) as error:
        load_open_questions(tmp_path / "q.jsonl")
    assert sentence in str(error.value)


@settings(deadline=None)
@given(st.lists(json_values | st.fixed_dictionaries({"prompt": json_values}, optional={
    "subject": json_values, "refusal_phrases": json_values, "choices": json_values, "answer": json_values,
}), min_size=1, max_size=3))  # fmt: skip
def test_whatever_a_file_holds_it_is_questions_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, rows: list[object]
):
    path = written(tmp_path_factory.getbasetemp() / "any.jsonl", *rows)
    for load in (load_questions, load_open_questions):
        try:
            found = load(path)
        except SenteiError as error:
            assert f"{path} line " in error.message
        else:
            assert len(found) == len(rows) and all(each.prompt.strip() for each in found)


def test_more_answers_than_anybody_would_wait_for_are_refused(tmp_path: Path):
    path = written(tmp_path / "q.jsonl", *({"prompt": "a", "subject": "b"} for _ in range(MOST_ANSWERS + 1)))
    with pytest.raises(SenteiError, match="asks for 1,001 written answers"):
        QuestionMetric(kind="valid_json", file=path, tokens=8).open_questions()
