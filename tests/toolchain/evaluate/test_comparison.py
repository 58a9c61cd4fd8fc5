"""What got worse and where, on answers small enough to check by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import SenteiError
from toolchain.evaluate import run
from toolchain.evaluate import writing as damage
from toolchain.evaluate.comparison import compare_task, mean_score, mean_within, perplexity_ratio, share
from toolchain.parts_cache import Parts, unfinished_parts
from toolchain.significance import compare_means
from toolchain.text.passages import number_passages, worst_passages


def question(number, *, right, subject=None, log_likelihoods=(-1.0, -2.0), choices=("yes", "no")):
    return {
        "id": number, "hash": str(number), "subject": subject, "question": f"question {number}",
        "choices": list(choices), "answer": 0, "log_likelihoods": list(log_likelihoods),
        "scores": {"acc": float(right)},
    }  # fmt: skip


def test_what_was_lost_is_listed_with_the_worst_first():
    original = [question(number, right=number < 4, subject="ab"[number % 2]) for number in range(6)]
    after = {0: (True, (-1, -2)), 1: (False, (-3, -2)), 2: (False, (-6, -2)), 3: (True, (-1, -2))}
    pruned = [
        question(
            n, right=after.get(n, (n == 5,))[0], subject="ab"[n % 2], log_likelihoods=after.get(n, (0, (-2, -1)))[1]
        )
        for n in range(6)
    ]
    found = compare_task("t", "acc", original, pruned)
    assert (found.lost, found.gained) == (2, 1)
    assert found.difference.value == pytest.approx(-1 / 6)
    assert found.difference.p_value == 1  # two against one: 2 * (C(3, 0) + C(3, 1)) / 2^3
    assert [each.id for each in found.worst_questions] == [2, 1]
    assert (found.worst_questions[0].original_margin, found.worst_questions[0].pruned_margin) == (1, -4)
    assert found.worst_questions[0].pruned_choice == "no"
    # a: questions 0, 2, 4 lost one of two; b: 1, 3, 5 lost one and gained one.
    assert [(each.subject, each.lost, each.gained) for each in found.worst_subjects] == [("a", 1, 0)]


def test_a_margin_of_acc_norm_is_by_character():
    before = question(0, right=True, log_likelihoods=(-3.0, -4.0), choices=("abc", "ab"))
    after = question(0, right=False, log_likelihoods=(-9.0, -4.0), choices=("abc", "ab"))
    for each, right in ((before, 1.0), (after, 0.0)):
        each["scores"] = {"acc_norm": right}
    worst = compare_task("t", "acc_norm", [before], [after]).worst_questions[0]
    assert (worst.original_margin, worst.pruned_margin) == (1.0, -1.0)


def test_scores_between_zero_and_one_get_a_t_test():
    before, after = ([question(n, right=0) for n in range(4)] for _ in range(2))
    for n in range(4):
        before[n]["scores"]["acc"], after[n]["scores"]["acc"] = 0.5, 0.5 - 0.1 * n
    found = compare_task("t", "acc", before, after)
    assert "t-test" in found.difference.test
    assert found.difference.value == pytest.approx(-0.15)


def test_mean_score_weighs_tasks_alike():
    found = mean_score([([1.0, 1.0], [1.0, 0.0]), ([0.0] * 10, [0.0] * 10)])
    assert (found.original, found.pruned, found.kept) == (0.5, 0.25, 0.5)
    # Differences 0 and -1: standard error 0.5 of that task's mean, a half of it in the mean of two.
    assert found.difference.low == pytest.approx(-0.25 - 1.959964 * 0.25)


def test_perplexity_ratio_is_of_the_windows_mean_losses():
    found = perplexity_ratio([1.0, 2.0, 3.0], [1.5, 2.4, 3.6])
    assert found.value == pytest.approx(math.exp(0.5))
    assert found.low < found.value < found.high
    assert found.verdict == "worse"
    assert perplexity_ratio([1.0], [2.0]).verdict == "no difference shown"


def test_share_of_right_answers():
    assert share([1.0, 0.0, 1.0, 0.0]).value == 0.5
    assert 0 < share([1.0] * 4).low < share([1.0] * 4).high == 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_an_interval_of_shares_stays_within_them(values: list[float]):
    found = mean_within(values, 0.0, 1.0)
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert compare_means(values).low == pytest.approx(found.low) or found.low == 0
    assert compare_means(values).high == pytest.approx(found.high) or found.high == 1


def test_an_interval_of_shares_is_cut_where_it_would_leave_them():
    found = mean_within([1.0, 1.0, 0.6], 0.0, 1.0)
    assert (found.value, found.high) == (pytest.approx(2.6 / 3), 1.0)
    assert mean_within([0.5], 0.0, 1.0).high is None


def test_repetition_and_distinct_ngrams():
    assert damage.repetition([1, 2, 3, 4, 5]) == 0
    # 1212 1212: four-grams 1212, 2121, 1212, 2121, 1212.
    assert damage.repetition([1, 2] * 4) == pytest.approx(1 - 2 / 5)
    assert damage.repetition([1, 2, 3]) is None
    assert damage.distinct([[1, 2, 1], [2, 1]], 1) == pytest.approx(2 / 5)
    assert damage.distinct([[1, 2, 1], [2, 1]], 2) == pytest.approx(2 / 5)
    assert damage.distinct([[]], 1) is None
    assert damage.common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2


def test_divergence_and_agreement():
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.25, 0.75]])
    assert damage.divergence(p.log(), q.log()) == pytest.approx(0.5 * math.log(3))
    assert damage.agreement(torch.cat([p, p]), torch.cat([p, q])) == 0.5


def test_prompts_are_spread_over_the_text():
    prompts = damage.choose_prompts(torch.arange(400).view(4, 100), 3)
    assert prompts[:, 0].tolist() == [0, 184, 368]
    assert prompts.shape == (3, damage.PROMPT_TOKENS)
    assert damage.choose_prompts(torch.arange(70).view(1, 70), 16).shape[0] == 2


def test_documents_are_told_apart(pico_model, tmp_path):
    from toolchain.model.loading import load_tokenizer
    from toolchain.text.windows import load_windows

    documents = ["The gardener prunes the trees. " * 8, "Short.", "In summer they bear fruit again. " * 8]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{each}"}}\n' for each in documents))
    tokenizer = load_tokenizer(pico_model)
    windows = load_windows(path, tokenizer, num_samples=None, seq_len=16).ids
    unit, numbers = number_passages(path, tokenizer, windows)
    assert unit == "document"
    for number, document in enumerate(documents):
        assert tokenizer.decode(windows[numbers == number]).strip() in document + " "
    original = torch.ones(windows[:, 1:].shape)
    pruned = original + 0.1 * (numbers[:, 1:] == 0) + 0.5 * (numbers[:, 1:] == 2) + 9 * (numbers[:, 1:] == 1)
    worst = worst_passages(unit, numbers, windows, (original, pruned), tokenizer, count=5)
    # The short one is left out.
    assert [each.number for each in worst] == [2, 0]
    assert worst[0].increase == pytest.approx(0.5, rel=1e-5)
    assert worst[0].excerpt.startswith("In summer")


def test_parts_are_taken_up_again_only_for_the_same_question(tmp_path):
    directory, asked = tmp_path / "out.parts", []

    def ask(identity):
        return Parts(directory).get("a/part", identity, lambda: asked.append(identity) or {"value": len(asked)})

    assert ask({"limit": 1}) == {"value": 1}
    assert ask({"limit": 1}) == {"value": 1}
    assert ask({"limit": 2}) == {"value": 2}
    assert Parts(directory).known("a/part", {"limit": 1})
    with (
        pytest.raises(SenteiError, match="interrupted run"),
        unfinished_parts(tmp_path / "out", force=False, resume=False),
    ):
        pass
    assert Parts(None).get("a/part", {}, lambda: {"value": 0}) == {"value": 0}


def test_no_part_is_written_that_is_too_large_to_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("toolchain.parts_cache.MOST_BYTES", 1000)
    for _ in range(2):
        assert Parts(tmp_path).get("large", {}, lambda: {"value": "木" * 400}) == {"value": "木" * 400}
    assert not list(tmp_path.iterdir())


def test_losses_of_more_tokens_than_json_may_hold_are_taken_up_again(
    wide_model, pruned_wide, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("toolchain.parts_cache.MOST_BYTES", 2000)
    read, read_now = [], run.token_losses
    monkeypatch.setattr(run, "token_losses", lambda *args, **more: read.append(1) or read_now(*args, **more))
    settings = run.EvaluationSettings(texts=(text,), num_windows=8, seq_len=32, device="cpu", dtype=torch.float32)

    def compared(parts):
        return run.evaluate(pruned_wide, wide_model, settings, parts).text_comparisons

    alone = run.evaluate(wide_model, None, settings, Parts(tmp_path))
    found = compared(Parts(tmp_path))
    assert len(read) == 2
    # The same windows, and in them the same tokens.
    assert found == compared(Parts(None))
    assert found[0].worst_passages and alone.evaluations[0].num_tokens == 8 * 31


def test_losses_that_are_gone_are_computed_again_and_damaged_ones_are_refused(tmp_path):
    def ask(losses, shape=(1, 2)):
        return Parts(tmp_path).get_with_losses("text", {}, lambda: ({}, np.array([losses], np.float32)), shape)[1]

    assert ask([1, 2]).tolist() == ask([3, 4]).tolist() == [[1, 2]]
    with pytest.raises(SenteiError, match=r"must hold float32 \[2, 2\]"):
        ask([1, 2], (2, 2))
    next(tmp_path.glob("*.safetensors")).unlink()
    assert ask([5, np.nan])[0, 0] == 5
    with pytest.raises(SenteiError, match="holds NaN or Inf"):
        ask([1, 2])


def test_two_windows_that_differ_much_have_no_interval() -> None:
    """Its upper end would be more than a float holds."""
    found = perplexity_ratio([3.0, 3.0], [3.1, 203.0])
    assert (found.low, found.high) == (None, None)
    assert found.value == pytest.approx(2.7e43, rel=0.05)
