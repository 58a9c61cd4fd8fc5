"""Tasks from local files: the prompts and scores must be lm-eval's own."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.command_line import refused, sentei
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.evaluate.lm_eval_tasks import TaskRequest, load_task, parse_task, run_task
from toolchain.evaluate.local_tasks import TASK_FILES
from toolchain.metrics.accuracy import AccuracyMetric, load_questions
from toolchain.metrics.token_metrics import measure
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model, load_tokenizer

QUESTIONS = {
    "winogrande": [
        {"sentence": "The vase fell on a rug but the _ held.", "option1": "vase", "option2": "rug", "answer": "1"},
        {"sentence": "Ann paid Sue because _ had worked for her.", "option1": "Ann", "option2": "Sue", "answer": "2"},
    ],
    "piqa": [
        {"goal": "To cool soup", "sol1": "blow on it.", "sol2": "put it on the fire again.", "label": 0},
        {"goal": "Open a jar", "sol1": "hit it with 'a' \"spoon\".", "sol2": "twist its lid.", "label": 1},
    ],
    "arc_easy": [
        {"question": "What do plants need?", "choices": {"text": ["light", "salt", "coins"], "label": ["A", "B", "C"]},
         "answerKey": "A"},
        {"question": "Ice is", "choices": {"text": ["hot", "cold", "alive", "loud"], "label": ["1", "2", "3", "4"]},
         "answerKey": "2"},
    ],
    "arc_challenge": [
        {"question": "Which is a force?", "choices": {"text": ["gravity", "a stone"], "label": ["A", "B"]},
         "answerKey": "A"},
    ],
    "hellaswag": [
        {"activity_label": "Baking", "ctx_a": "A man mixes flour [title] and  eggs.", "ctx_b": "he then",
         "endings": ["bakes a cake.", "flies [step] away.", "sings.", "is a cake."], "label": "0"},
        {"activity_label": "Removing ice", "ctx_a": "How to do it. [title] Wait.", "ctx_b": "",
         "endings": ["Then scrape.", "Then eat.", "Then sleep.", "Then jump."], "label": "0"},
    ],
    "mmlu_us_foreign_policy": [
        {"question": " Who signs treaties? ", "subject": "us_foreign_policy", "answer": 1,
         "choices": ["The mayor", "The president", "The army", "Nobody"]},
    ],
    "ja_leaderboard_jcommonsenseqa": [
        {"question": "田んぼが広がる風景を何という？", "choice0": "畑", "choice1": "海", "choice2": "田園",
         "choice3": "地方", "choice4": "牧場", "label": 2},
    ],
}  # fmt: skip
OURS = {"mmlu_us_foreign_policy": "mmlu", "ja_leaderboard_jcommonsenseqa": "jcommonsenseqa"}


def write_lines(path: Path, rows: list[dict]) -> Path:
    # A separator that is no end of line in JSON.
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False).replace("ANY", "\u2028") + "\n" for row in rows), "utf-8"
    )
    return path


@pytest.fixture(scope="module")
def demo(demo_model: Path):
    return load_model(demo_model, dtype=torch.float32), load_tokenizer(demo_model)


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def lm_evals_own_samples(name: str, file: Path, demo: tuple, manager) -> list[dict]:
    """lm-eval as its users run it: its own task definition and model, but for the place of the data."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    splits = {split: str(file) for split in ("train", "validation", "test", "dev")}
    overrides = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
        "num_fewshot": 0,
    }
    group = manager.load([{"group": "own", "task": [{"task": name, **overrides}]}])
    results = simple_evaluate(
        model=HFLM(pretrained=demo[0], tokenizer=demo[1]), tasks=list(group["tasks"].values()), bootstrap_iters=0,
        task_manager=manager,
    )  # fmt: skip
    assert results is not None
    (samples,) = results["samples"].values()
    return samples


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_answer_is_scored_as_lm_eval_scores_it(name: str, demo: tuple, manager, tmp_path: Path):
    file = write_lines(tmp_path / "questions.jsonl", QUESTIONS[name])
    theirs = lm_evals_own_samples(name, file, demo, manager)
    task = load_task(TaskRequest(name=OURS.get(name, name), file=file))
    counted: list[None] = []
    ours = run_task(*demo, task, limit=None, on_request=lambda: counted.append(None))
    assert len(counted) == task.num_requests(None)
    assert len(theirs) == len(ours["questions"]) == len(QUESTIONS[name])
    assert ours["num_fewshot"] == 0
    (part,) = task.parts.values()
    for mine, own in zip(ours["questions"], theirs, strict=True):
        asked = [request.args for request in part.instances if request.doc_id == mine["id"]]
        assert asked == own["arguments"]
        assert mine["log_likelihoods"] == pytest.approx([each[0] for each in own["filtered_resps"]], abs=1e-4)
        assert mine["scores"] == {metric: own[metric] for metric in own["metrics"]}


def test_every_subject_of_mmlu_is_introduced_as_in_lm_eval():
    import lm_eval.tasks
    from lm_eval.utils import apply_template

    ours = yaml.safe_load((TASK_FILES / "mmlu.yaml").read_text().replace("!function", ""))["description"]
    subjects = sorted((Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml"))
    assert len(subjects) == 57
    for path in subjects:
        theirs = yaml.safe_load(path.read_text())
        assert apply_template(ours, {"subject": theirs["dataset_name"]}) == theirs["description"]


def test_hellaswag_with_all_of_it_in_one_field(tmp_path: Path):
    rows = [
        {"context": "Welding: A man: he welds. It is hot. another man", "endings": ["a", "b"], "label": 1},
        {"context": "Swimming: men swim", "endings": ["a", "b"], "label": 0},
    ]
    task = load_task(TaskRequest(name="hellaswag", file=write_lines(tmp_path / "h.jsonl", rows)))
    prompts = [task.parts["hellaswag"].doc_to_text(doc) for doc in task.parts["hellaswag"].eval_docs]
    assert prompts == ["Welding: A man: he welds. It is hot. Another man", "Swimming: men swim"]


@torch.inference_mode()
def test_a_persons_own_questions_score_as_the_search_scores_them(demo_model: Path, demo: tuple, tmp_path: Path):
    rows = [
        {
            "prompt": "The capital of France is",
            "choices": ["Paris", "Rome", "a very long and wrong answer"],
            "answer": 0,
        },
        {"prompt": "Water is ", "choices": ["wet", "a kind of stone"], "answer": 0, "subject": "nature"},
        {"prompt": "Two and two make", "choices": [" four", "five"], "answer": 0},
        {"prompt": "日本の首都は", "choices": ["東京", "大阪です"], "answer": 1},
        {"prompt": "A separatorANYwithin:", "choices": ["yes", "no"], "answer": 1},
    ]
    file = write_lines(tmp_path / "mine.jsonl", rows)
    questions = load_questions(file)
    result = run_task(*demo, load_task(TaskRequest(name="questions", file=file)), limit=None)
    assert result["metric"] == "acc_norm"
    assert [each["subject"] for each in result["questions"]] == [None, "nature", None, None, None]
    walk = LayerWalk(demo[0], open_checkpoint(demo_model).family)
    for question, answered in zip(questions, result["questions"], strict=True):
        metric = AccuracyMetric([question], demo[1], source="mine", seq_len=64)
        assert measure(walk, metric) == answered["scores"]["acc_norm"]
        losses = torch.zeros(len(question.choices))
        states = walk.forward(walk.embed(metric.ids))[metric._row, metric._place]
        losses.index_add_(0, metric._row, walk.losses(states, metric._target))
        assert answered["log_likelihoods"] == pytest.approx((-losses).tolist(), abs=1e-3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("files")
    mine = [
        {"prompt": f"{number} and one make", "choices": [str(number + 1), str(number + 3)], "answer": 0,
         "subject": "sums" if number < 4 else "large sums"}
        for number in range(8)
    ]  # fmt: skip
    documents = [{"text": f"Document {number}. The gardener prunes the trees in winter. " * 6} for number in range(8)]
    return {
        "piqa": write_lines(directory / "piqa.jsonl", QUESTIONS["piqa"]),
        "mine": write_lines(directory / "mine.jsonl", mine),
        "text": write_lines(directory / "held-out.jsonl", documents),
    }


def test_evaluation_against_the_original(demo_model: Path, pruned_demo: Path, files: dict[str, Path], tmp_path: Path):
    asked = [
        "evaluate", pruned_demo, "--against", demo_model, "--text", files["text"], "--seq-len", 64, "--windows", 4,
        "--task", f"piqa={files['piqa']}", "--questions", files["mine"], "--generations", 2, "-o", tmp_path / "out",
    ]  # fmt: skip
    done = sentei(*asked)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "mine.jsonl" in done.stdout
    assert not (tmp_path / "out.parts").exists()
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [each["model"] for each in document["evaluations"]] == ["original", "pruned"]
    ratio = document["text_comparisons"][0]["perplexity_ratio"]
    values = [each["perplexity"] for each in document["evaluations"]]
    assert ratio["value"] == pytest.approx(values[1] / values[0], rel=1e-4)
    assert ratio["low"] < ratio["value"] < ratio["high"]
    assert [each["task"] for each in document["task_comparisons"]] == ["piqa", "mine.jsonl"]
    assert document["text_comparisons"][0]["worst_passages"][0]["unit"] == "document"
    generation = document["generation"]
    assert generation["kl_divergence"]["value"] > 0
    assert generation["num_prompts"] == len(generation["samples"]) == 2
    parts = sorted((tmp_path / "out" / "parts").glob("*.json"))
    assert len(parts) == 7

    # The same evaluation interrupted after some of its parts computes only the others.
    (tmp_path / "out.parts").mkdir()
    kept = [part for part in parts if not part.name.startswith(("generation", "pruned-mine"))]
    for part in kept:
        (tmp_path / "out.parts" / part.name).write_bytes(part.read_bytes())
    changed = json.loads(kept[-1].read_text())
    changed["result"]["duration_s"] = 12345.0
    (tmp_path / "out.parts" / kept[-1].name).write_text(json.dumps(changed))
    (tmp_path / "out" / "evaluation.json").rename(tmp_path / "first.json")
    for part in (tmp_path / "out" / "parts").iterdir():
        part.unlink()
    (tmp_path / "out" / "parts").rmdir()
    refused(sentei(*asked), "interrupted run", "--resume")
    done = sentei(*asked, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert 12345.0 in [each["duration_s"] for each in (*again["tasks"], *again["evaluations"])]
    assert again["task_comparisons"] == document["task_comparisons"]
    assert again["generation"]["samples"] == document["generation"]["samples"]


def test_a_model_against_itself_shows_no_difference(pico_model: Path, files: dict[str, Path]):
    done = sentei(
        "evaluate", pico_model, "--against", pico_model, "--text", files["text"], "--seq-len", 32, "--windows", 3,
        "--questions", files["mine"], "--generations", 2, "--json",
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert document["text_comparisons"][0]["perplexity_ratio"]["value"] == 1
    assert document["text_comparisons"][0]["perplexity_ratio"]["p_value"] == 1
    assert document["text_comparisons"][0]["worst_passages"] == []
    assert document["task_comparisons"][0]["difference"]["verdict"] == "no difference shown"
    assert document["generation"]["token_agreement"]["value"] == 1
    assert document["generation"]["kl_divergence"]["value"] == pytest.approx(0, abs=1e-6)
    assert document["generation"]["common_prefix_tokens"] == 64


def test_bad_input_is_refused_before_a_model_is_loaded(pico_model: Path, files: dict[str, Path], tmp_path: Path):
    def asked(*more: object):
        return sentei("evaluate", pico_model, *more)

    refused(asked(), "nothing to evaluate on")
    refused(asked("--offload", "--questions", files["mine"]), "--offload measures perplexity only")
    refused(asked("--offload", "--text", files["text"], "--generations", 2), "--offload measures perplexity only")
    refused(asked("--text", files["text"], "--generations", 2), "Give --against")
    refused(asked("--task", f"gsm8k={files['piqa']}"), "cannot be read from a file", "winogrande")
    refused(asked("--task", "no_such_task"), "lm-eval has no such task")
    refused(asked("--task", f"mmlu={files['piqa']}"), "line 1 has no field 'question'")
    refused(asked("--task", f"piqa={tmp_path / 'none'}"), "does not exist")
    refused(asked("--questions", files["piqa"]), "not a JSON object with prompt, choices and answer")
    refused(asked("--questions", files["mine"], "--questions", files["mine"]), "Two of the tasks")
    refused(asked("--questions", files["mine"], "--resume"), "--resume needs --out")
    refused(asked("--questions", files["mine"], "--limit", 0), "--limit 0")


def test_a_hub_task_without_a_hub_is_one_sentence(pico_model: Path, monkeypatch):
    def load_dataset(*arguments: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    refused(sentei("evaluate", pico_model, "--task", "piqa"), "could not be downloaded", "--task piqa=FILE.jsonl")


def test_without_lm_eval_a_sentence_names_the_extra(pico_model: Path, files: dict[str, Path], monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(sentei("evaluate", pico_model, "--questions", files["mine"]), "lm-eval", "pip install 'sentei[eval]'")


def test_a_name_with_a_file_is_local():
    assert parse_task("piqa=a=b.jsonl") == TaskRequest(name="piqa", file=Path("a=b.jsonl"))
    assert parse_task("gsm8k") == TaskRequest(name="gsm8k", file=None)
    with pytest.raises(SenteiError, match="cannot be read"):
        parse_task("questions=a.jsonl")
