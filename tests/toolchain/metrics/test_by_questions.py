"""Searching, limiting and evaluating by one's own questions, as a person would: one definition, one number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import PLAIN, refused, sentei
from toolchain.architecture.families import FAMILIES
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.metrics.choose import choose_metric
from toolchain.metrics.token_metrics import measure
from toolchain.metrics.written import write_greedily
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.plan.plan import load_plan

SETTINGS = ("--samples", 2, "--seq-len", 64, "--align", 8, "--dtype", "float32", *PLAIN)
CHOICES = ["red", "a green one", "blue"]
PROMPTS = [f"The {what} in the {where} is" for what in ("apple", "door", "coat", "car") for where in ("yard", "house")]
TOKENS = 5


def walk_over(directory: Path) -> LayerWalk:
    checkpoint = open_checkpoint(directory)
    return LayerWalk(load_model(checkpoint, dtype=torch.float32), checkpoint.family)


@pytest.fixture(scope="module")
def questions(demo_pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the original answers is right, and what it writes is a refusal: it is perfect, and any change shows."""
    directory = tmp_path_factory.mktemp("questions")
    model, tokenizer = load_model(demo_pico, dtype=torch.float32), load_tokenizer(demo_pico)
    texts = dict(write_greedily(model, [tokenizer(each)["input_ids"] for each in PROMPTS], TOKENS))
    rows = [
        {
            "prompt": prompt, "choices": CHOICES, "subject": "safety" if number % 2 else "other",
            "answer": _picked(model, tokenizer, prompt, directory / "one.jsonl"),
            "refusal_phrases": [tokenizer.decode(texts[number], skip_special_tokens=True)],
        }
        for number, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    path = directory / "own.jsonl"
    path.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in rows), encoding="utf-8")
    return path


def _picked(model: Any, tokenizer: Any, prompt: str, probe: Path) -> int:
    """The choice that is right if the model is: accuracy is 1 with it alone."""
    right = []
    for answer in range(len(CHOICES)):
        probe.write_text(json.dumps({"prompt": prompt, "choices": CHOICES, "answer": answer}))
        metric = choose_metric(f"accuracy:{probe}", torch.zeros(1, 64), tokenizer)
        right += [answer] if measure(LayerWalk(model, FAMILIES["llama"]), metric) == 1 else []
    (found,) = right
    return found


def prune(model: Path, out: Path, *options: object, sparsity: float = 0.5) -> Any:
    removals = () if "--attention-removals" in options else ("--attention-removals", 2)
    done = sentei("prune", model, "-o", out, "--sparsity", sparsity, *removals, *SETTINGS, *options)
    assert done.returncode == 0, done.stderr
    return load_plan(out).document


def test_a_groups_floor_stops_what_the_average_allows(demo_pico: Path, questions: Path, tmp_path: Path):
    every = prune(demo_pico, tmp_path / "all", "--limit-metric", f"accuracy:{questions}", "--min-metric", 0.8)
    limited = [step.limit_metric for step in (*every.stage_1, *every.trace)]
    assert limited and all(value is not None and value >= 0.8 for value in limited)
    safety = f"accuracy:{questions}#group=safety"
    options = ("--attention-removals", 2, "--limit-metric", safety, "--min-metric", 0.8)
    done = sentei("prune", demo_pico, "-o", tmp_path / "group", "--sparsity", 0.5, *SETTINGS, *options)
    found = load_plan(tmp_path / "group")
    assert found.document.stopped_because is not None
    assert found.document.stopped_because.startswith("accuracy would be 0.75")
    assert "on own.jsonl, group safety; the limit is 0.8" in found.document.stopped_because
    # It lets less go, and if not even the first step holds, nothing is written but the plan.
    assert found.steps[-1].num_block_parameters > load_plan(tmp_path / "all").steps[-1].num_block_parameters
    assert done.returncode == int(len(found.steps) == 1)


def test_a_floor_of_what_is_written_holds_for_the_model_that_is_written(
    demo_pico: Path, questions: Path, tmp_path: Path
):
    """Phrases are what the models of stage 1 write: the first attention that goes makes one of them write otherwise."""
    prune(demo_pico, tmp_path / "free")
    plan, walk, tokenizer = load_plan(tmp_path / "free"), walk_over(demo_pico), load_tokenizer(demo_pico)
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    for step in range(1, len(plan.document.stage_1) + 1):
        walk.layers.narrow(plan.cut(step).kept_neurons)
        for number, tokens in write_greedily(walk.model, ids, TOKENS):
            rows[number]["refusal_phrases"].append(tokenizer.decode(tokens, skip_special_tokens=True))
        walk.layers.restore()
    path = tmp_path / "written.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    metric = f"refusal_rate:{path}#wanted=refusals,tokens={TOKENS}"
    found = prune(demo_pico, tmp_path / "out", "--limit-metric", metric, "--min-metric", 1)
    assert found.stopped_because is not None and found.stopped_because.startswith("refusal_rate would be")
    assert "without the attention of layer" in found.stopped_because
    assert len(found.stage_1) == len(plan.document.stage_1) and not found.trace
    written = measure(walk_over(tmp_path / "out"), choose_metric(metric, torch.zeros(1, 64), tokenizer))
    assert found.limit is not None and found.limit.measured == written == 1


def test_a_search_goes_by_what_the_model_writes_and_says_what_that_takes(
    demo_pico: Path, questions: Path, tmp_path: Path
):
    metric = f"refusal_rate:{questions}#wanted=refusals,tokens={TOKENS}"
    options = ("--metric", metric, "--attention-removals", 2)
    done = sentei("prune", demo_pico, "-o", tmp_path / "out", "--sparsity", 0.3, *SETTINGS, *options)
    assert done.returncode == 0, done.stderr
    assert "writes 8 answers of at most 5 tokens (40 tokens)" in done.stderr.replace("\n", " ")
    found = load_plan(tmp_path / "out").document
    assert (found.metric, found.metric_higher_is_better, found.metric_original) == ("refusal_rate", True, 1)
    for step in found.trace:
        assert step.metric == max(step.candidates.values())
        assert set(step.ties or ()) in (set(), {n for n, each in step.candidates.items() if each == step.metric})
    # The same again, to the byte.
    sentei("prune", demo_pico, "-o", tmp_path / "again", "--sparsity", 0.3, *SETTINGS, *options)
    assert (tmp_path / "again" / "plan.json").read_bytes() == (tmp_path / "out" / "plan.json").read_bytes()
    shown = sentei("plan", "why", tmp_path / "out", found.trace[0].removed).stdout
    assert ("was a tie" in shown) == any(step.ties for step in found.trace)


def _class_of(questions: Path) -> str:
    """The right answer of most questions."""
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    answers = [CHOICES[row["answer"]] for row in rows]
    return max(CHOICES, key=answers.count)


def test_an_evaluation_counts_the_same(demo_pico: Path, questions: Path, tmp_path: Path):
    prune(demo_pico, tmp_path / "pruned")
    asked = [
        f"accuracy:{questions}#group=safety", f"f1:{questions}#class={_class_of(questions)}",
        f"refusal_rate:{questions}#wanted=refusals,tokens={TOKENS}",
        f"refusal_rate:{questions}#wanted=answers,tokens={TOKENS}", f"valid_json:{questions}#tokens=4",
    ]  # fmt: skip
    done = sentei(
        "evaluate", tmp_path / "pruned", "--against", demo_pico, "-o", tmp_path / "out", "--dtype", "float32",
        *(word for each in asked for word in ("--metric", each)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(demo_pico)
    for side, directory in (("original", demo_pico), ("pruned", tmp_path / "pruned")):
        walk = walk_over(directory)
        results = [each for each in found["metrics"] if each["model"] == side]
        assert [each["metric"] for each in results] == [each.replace(f"{questions.parent}/", "") for each in asked]
        for each, name in zip(results, asked, strict=True):
            expected = measure(walk, choose_metric(name, torch.zeros(1, 64), tokenizer))
            assert each["score"]["value"] == pytest.approx(expected)
            assert each["score"]["low"] <= expected <= each["score"]["high"]
    by_name = {each["metric"].partition(":")[2]: each for each in found["metric_comparisons"]}
    kept, helped = (by_name[f"own.jsonl#wanted={each},tokens=5"] for each in ("refusals", "answers"))
    # The same refusals are lost in one and gained in the other.
    assert kept["difference"]["value"] == helped["difference"]["value"] < 0
    assert (kept["lost"], kept["gained"]) == (helped["gained"], helped["lost"])
    verdicts = {kept["difference"]["verdict"], helped["difference"]["verdict"]}
    assert verdicts in ({"worse", "better"}, {"no difference shown"})
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out" / "parts").iterdir()]
    assert all(len(each["result"]["outcomes"]) in (4, 8) for each in parts)
    assert "lower is better" in done.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--metric", "refusal_rate:Q#wanted=refusals", "--max-metric", 0.1), "refusals wanted"),
        (("--metric", "refusal_rate:Q#wanted=answers", "--min-metric", 0.9), "lower is better"),
        (("--metric", "refusal_rate:Q", "--min-metric", 0.9), "whether refusals are good or bad"),
        (("--metric", "valid_json:Q", "--offload"), "written answers needs the whole model"),
        (("--metric", "valid_json:Q", "--search", "racing"), "cannot race"),
        (("--limit-metric", "accuracy:Q#group=law", "--min-metric", 0.5), "no question has the subject 'law'"),
        (("--metric", "f1:Q#class=grey"), "no question has the right answer 'grey'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_computed(
    demo_pico: Path, questions: Path, tmp_path: Path, options: tuple[object, ...], sentence: str
):
    given = [each.replace("Q", str(questions)) if isinstance(each, str) else each for each in options]
    refused(sentei("prune", demo_pico, "-o", tmp_path / "out", "--sparsity", 0.3, *SETTINGS, *given), sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--metric", "perplexity"), "is no metric of questions"),
        (
            ("--metric", "valid_json:Q", "--metric", "valid_json:Q"),
            "Two of the metrics are called valid_json:own.jsonl",
        ),
        (("--metric", "valid_json:Q", "--offload"), "needs the whole model"),
        (("--metric", "valid_json:nowhere.jsonl"), "nowhere.jsonl does not exist"),
    ],
)
def test_an_evaluation_refuses_too(
    demo_pico: Path, questions: Path, tmp_path: Path, options: tuple[object, ...], sentence: str
):
    given = [each.replace("Q", str(questions)) if isinstance(each, str) else each for each in options]
    refused(sentei("evaluate", demo_pico, "-o", tmp_path / "out", *given), sentence)


CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid"}


@pytest.mark.acceptance
def test_a_real_model_keeps_what_it_must_write_and_ties_are_told(demo_model: Path, tmp_path: Path):
    """A phrase need not be a refusal: here it is the capital that has to be named."""
    path = tmp_path / "capitals.jsonl"
    rows = [
        {
            "prompt": f"The capital city of {country} is", "refusal_phrases": [capital], "subject": "geography",
            "choices": [capital, "a river"], "answer": 0,
        }
        for country, capital in CAPITALS.items()
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    named = f"refusal_rate:{path}#wanted=refusals,group=geography,tokens=8"
    done = sentei(
        "prune", demo_model, "-o", tmp_path / "out", "--sparsity", 0.02, "--attention-removals", 1, "--samples", 2,
        "--seq-len", 64, "--align", 8, "--dtype", "float32", *PLAIN, "--metric", f"accuracy:{path}",
        "--limit-metric", named, "--min-metric", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_plan(tmp_path / "out").document
    # 30 candidates share five values.
    (step,) = found.trace
    assert step.ties is not None and len(step.ties) > 1
    assert step.removed == min(step.ties, key=step.ties.__getitem__)
    assert "1 of 1 attentions went by perplexity" in done.stdout
    assert found.limit is not None and found.limit.original == found.limit.measured == 1
    # Transformers' own generate, from what was written.
    model, tokenizer = load_model(tmp_path / "out", dtype=torch.float32), load_tokenizer(demo_model)
    for row, capital in zip(rows, CAPITALS.values(), strict=True):
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert capital in tokenizer.decode(answer)
