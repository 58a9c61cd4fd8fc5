"""Tasks from local files: the prompts and scores must be lm-eval's own."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.command_line import refused, sentei
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.evaluate.fewshot import example_source, set_examples
from toolchain.evaluate.lm_eval_tasks import load_task, run_task
from toolchain.evaluate.local_tasks import TASK_FILES
from toolchain.evaluate.task_requests import TaskRequest, parse_task
from toolchain.metrics.accuracy import ChoicesMetric
from toolchain.metrics.question_metrics import QuestionMetric
from toolchain.metrics.questions import load_questions
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
# What may stand before them: lm-eval draws, so the same ones must be drawn in the same order.
EXAMPLES = {
    "winogrande": [
        {"sentence": f"The {first} beat the {second} since the _ was fast.", "option1": first, "option2": second,
         "answer": "1"}
        for first, second in (("fox", "hen"), ("car", "bike"), ("boat", "swimmer"), ("boy", "old man"))
    ],
    "piqa": [{"goal": f"To fill {each}", "sol1": "pour in water.", "sol2": "add a hole.", "label": 0}
             for each in ("a cup", "a pool", "a jug", "a bath")],
    "arc_easy": [{"question": f"What is {number} and one?", "answerKey": "B",
                  "choices": {"text": ["9", str(number + 1)], "label": ["A", "B"]}} for number in range(4)],
    "hellaswag": [{"activity_label": "Walking", "ctx_a": f"A man walks to {each}.", "ctx_b": "he",
                   "endings": ["sits down.", "explodes.", "is a wall.", "swims up."], "label": "0"}
                  for each in ("a bench", "a chair", "a tree", "a stone")],
    "mmlu_us_foreign_policy": [
        {"question": f"Treaty number {number}?", "subject": "us_foreign_policy", "answer": number,
         "choices": ["One", "Two", "Three", "Four"]} for number in range(4)
    ],
    "ja_leaderboard_jcommonsenseqa": [
        {"question": f"{each}は何か？", "choice0": "物", "choice1": "人", "choice2": "国", "choice3": "色",
         "choice4": "数", "label": 0} for each in ("机", "椅子", "箱", "鍵")
    ],
}  # fmt: skip
OURS = {"mmlu_us_foreign_policy": "mmlu", "ja_leaderboard_jcommonsenseqa": "jcommonsenseqa"}


def write_lines(path: Path, rows: list[dict]) -> Path:
    # A separator that is no end of line in JSON.
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False).replace("ANY", "\u2028") + "\n" for row in rows), "utf-8"
    )
    return path


@pytest.fixture(autouse=True)
def no_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval lists all installed packages after every task, in another process, which takes longer than the rest."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def demo(demo_model: Path):
    return load_model(demo_model, dtype=torch.float32), load_tokenizer(demo_model)


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def lm_evals_own_samples(name: str, file: Path, model, manager, examples: Path | None = None, **asked) -> list[dict]:
    """lm-eval as its users run it: its own task definition and model, but for the place of the data."""
    from lm_eval import simple_evaluate

    splits = {split: str(file) for split in ("train", "validation", "test", "dev")}
    if examples is not None:
        splits |= {split: str(examples) for split in ("train", "dev")}
    overrides = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
    if examples is None:
        overrides["num_fewshot"] = 0
    group = manager.load([{"group": "own", "task": [{"task": name, **overrides}]}])
    results = simple_evaluate(
        model=model, tasks=list(group["tasks"].values()), bootstrap_iters=0, task_manager=manager, **asked
    )
    assert results is not None
    (samples,) = results["samples"].values()
    return samples


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_answer_is_scored_as_lm_eval_scores_it(name: str, demo: tuple, manager, tmp_path: Path):
    from lm_eval.models.huggingface import HFLM

    file = write_lines(tmp_path / "questions.jsonl", QUESTIONS[name])
    theirs = lm_evals_own_samples(name, file, HFLM(pretrained=demo[0], tokenizer=demo[1]), manager)
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


@pytest.fixture(scope="module")
def pico(pico_model: Path):
    return load_model(pico_model, dtype=torch.float32), load_tokenizer(pico_model)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_drawn_and_written_as_lm_eval_does(name: str, pico: tuple, manager, tmp_path: Path):
    from lm_eval.models.huggingface import HFLM

    file = write_lines(tmp_path / "questions.jsonl", QUESTIONS[name])
    examples = write_lines(tmp_path / "examples.jsonl", EXAMPLES[name])
    theirs = lm_evals_own_samples(
        name, file, HFLM(pretrained=pico[0], tokenizer=pico[1]), manager, examples, num_fewshot=3
    )
    request = TaskRequest(name=OURS.get(name, name), file=file, num_fewshot=3, fewshot_file=examples)
    task = load_task(request)
    found = [run_task(*pico, each, limit=None) for each in (task, task)]
    (part,) = task.parts.values()
    for mine, own in zip(found[0]["questions"], theirs, strict=True):
        assert [each.args for each in part.instances if each.doc_id == own["doc_id"]] == own["arguments"]
        assert mine["scores"] == {metric: own[metric] for metric in own["metrics"]}
    assert {(each["num_fewshot"], each["fewshot_source"]) for each in found} == {(3, "examples.jsonl")}
    assert len({each["prompts_sha256"] for each in found}) == 1, "asked again, it must be the same examples"


def contexts(task, **chat) -> list[str]:
    (part,) = task.parts.values()
    part.set_fewshot_seed(1234)
    return [part.fewshot_context(doc, part.config.num_fewshot, **chat) for doc in part.eval_docs]


def test_what_stands_before_a_question(tmp_path: Path):
    arc = load_task(
        TaskRequest(
            name="arc_easy", file=write_lines(tmp_path / "arc.jsonl", QUESTIONS["arc_easy"][:1]), num_fewshot=1,
            fewshot_file=write_lines(tmp_path / "arc_train.jsonl", QUESTIONS["arc_easy"][1:]),
        )
    )  # fmt: skip
    assert contexts(arc) == ["Question: Ice is\nAnswer: cold\n\nQuestion: What do plants need?\nAnswer:"]

    # A person's own: the first of the file, in its order, before every question.
    mine = [{"prompt": f"{each} is", "choices": ["a thing", "no thing"], "answer": 0} for each in ("Air", "Tea")]
    first = [{"prompt": f"{each} is", "choices": ["no", "wet"], "answer": 1} for each in ("Rain", "Fog", "Dew")]
    own = load_task(
        TaskRequest(
            name="questions", file=write_lines(tmp_path / "mine.jsonl", mine), num_fewshot=2,
            fewshot_file=write_lines(tmp_path / "first.jsonl", first),
        )
    )  # fmt: skip
    assert contexts(own) == [f"Rain is wet\n\nFog is wet\n\n{each} is" for each in ("Air", "Tea")]

    # Each question of MMLU sees its own subject.
    def mmlu(subject: str, question: str) -> dict:
        return {"question": question, "subject": subject, "choices": ["k", "l", "m", "n"], "answer": 2}

    asked = [mmlu("high_school_biology", "B?"), mmlu("virology", "V?")]
    shown = [
        mmlu(subject, f"{subject} {number}") for number in (1, 2) for subject in ("virology", "high_school_biology")
    ]
    task = load_task(
        TaskRequest(
            name="mmlu", file=write_lines(tmp_path / "mmlu.jsonl", asked), num_fewshot=1,
            fewshot_file=write_lines(tmp_path / "dev.jsonl", shown),
        )
    )  # fmt: skip
    choices = "A. k\nB. l\nC. m\nD. n\nAnswer:"
    assert contexts(task) == [
        f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
        f"{name} 1\n{choices} C\n\n{question}\n{choices}"
        for name, question in (("high_school_biology", "B?"), ("virology", "V?"))
    ]


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
        # One token with the end of its prompt.
        {"prompt": "我有一", "choices": ["个", "。"], "answer": 0},
    ]
    file = write_lines(tmp_path / "mine.jsonl", rows)
    questions = load_questions(file)
    result = run_task(*demo, load_task(TaskRequest(name="questions", file=file)), limit=None)
    assert result["metric"] == "acc_norm"
    assert [each["subject"] for each in result["questions"]] == [None, "nature", None, None, None, None]
    walk = LayerWalk(demo[0], open_checkpoint(demo_model).family)
    for question, answered in zip(questions, result["questions"], strict=True):
        metric = ChoicesMetric(
            [question], demo[1], asked=QuestionMetric(kind="accuracy", file=Path("mine")), seq_len=64
        )
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
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    assert len(parts) == 9  # and two with losses

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


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples for the questions in ``mine.jsonl``."""
    rows = [{"prompt": f"{each} and one make", "choices": [f"{each + 1}", "9"], "answer": 0} for each in (20, 30, 40)]
    return write_lines(tmp_path_factory.mktemp("shown") / "shown.jsonl", rows)


def test_a_real_model_is_asked_with_examples_in_its_template(
    demo_model: Path, files: dict[str, Path], shown: Path, tmp_path: Path
):
    asked = [
        "evaluate", demo_model, "--questions", files["mine"], "--limit", 2, "--num-fewshot", 2,
        "--fewshot", f"mine.jsonl={shown}", "--apply-chat-template", "--batch-size", "auto", "-o", tmp_path / "out",
    ]  # fmt: skip
    done = sentei(*asked, "--quiet")
    assert done.returncode == 0, done.stderr
    assert "mine.jsonl: 2 examples before each question, from shown.jsonl." in done.stdout
    assert "Asked in the model's chat template." in done.stdout
    [task] = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]
    told = ("num_fewshot", "fewshot_source", "num_questions", "batch_size", "chat_template", "num_cut")
    assert [task[each] for each in told] == [2, "shown.jsonl", 2, 16, True, 0]
    plain = json.loads(sentei(*asked[:6], "--batch-size", 1, "--json", "--quiet").stdout)["tasks"][0]
    assert [plain[each] for each in told] == [0, None, 2, 1, False, 0]
    assert task["prompts_sha256"] != plain["prompts_sha256"]


def test_examples_in_a_chat_are_turns_of_their_own(demo: tuple, files: dict[str, Path], shown: Path):
    request = TaskRequest(name="questions", file=files["mine"], num_fewshot=1, fewshot_file=shown)
    task = load_task(request, chat_template=True)
    run_task(*demo, task, limit=1, chat_template=True)
    (part,) = task.parts.values()
    context, choice = part.instances[0].args
    system, _, turns = context.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\n")
    assert turns == (
        "<|im_start|>user\n20 and one make<|im_end|>\n<|im_start|>assistant\n21<|im_end|>\n"
        "<|im_start|>user\n0 and one make<|im_end|>\n<|im_start|>assistant\n"
    )
    assert choice == "1"


def test_models_that_were_asked_in_two_ways_are_not_compared(
    pico_model: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answers = iter(["one", "other"])
    asked = run_task

    def ask(*arguments, **more):
        return {**asked(*arguments, **more), "prompts_sha256": next(answers)}

    monkeypatch.setattr("toolchain.evaluate.run.run_task", ask)
    refused(
        sentei("evaluate", pico_model, "--against", pico_model, "--questions", files["mine"], "--quiet"),
        "mine.jsonl: the two models were not asked the same",
    )


def test_another_number_of_examples_is_not_taken_from_an_interrupted_run(
    pico_model: Path, files: dict[str, Path], shown: Path
):
    def digest(num_fewshot: int | None, file: Path | None = shown) -> str:
        request = TaskRequest(name="questions", file=files["mine"], num_fewshot=num_fewshot, fewshot_file=file)
        return load_task(request).sha256

    other = write_lines(shown.with_name("other.jsonl"), [json.loads(shown.read_text().splitlines()[0])] * 2)
    digests = [digest(None, None), digest(0, None), digest(1), digest(2), digest(2, other)]
    assert len(set(digests)) == len(digests)


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


def test_examples_that_cannot_be_shown_are_refused_before_a_model_is_loaded(
    pico_model: Path, files: dict[str, Path], shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("toolchain.evaluate.run.open_walk", lambda *_, **__: pytest.fail("a model was loaded"))
    mine, piqa = files["mine"], f"piqa={files['piqa']}"

    def asked(*more: object):
        return sentei("evaluate", pico_model, *more)

    refused(asked("--questions", mine, "--num-fewshot", -1), "--num-fewshot -1 makes no sense")
    refused(asked("--text", files["text"], "--num-fewshot", 1), "--num-fewshot is for tasks and questions")
    refused(asked("--questions", mine, "--num-fewshot", 1), "other questions", "--fewshot mine.jsonl=FILE.jsonl")
    refused(asked("--questions", mine, "--fewshot", f"mine.jsonl={shown}"), "none are asked for", "--num-fewshot N")
    refused(asked("--questions", mine, "--num-fewshot", 1, "--fewshot", f"piqa={shown}"), "NAME out of mine.jsonl")
    refused(asked("--task", "gsm8k", "--num-fewshot", 1, "--fewshot", f"gsm8k={shown}"), "has its own examples")
    twice = ("--num-fewshot", 1, "--fewshot", f"mine.jsonl={shown}", "--fewshot", f"mine.jsonl={mine}")
    refused(asked("--questions", mine, *twice), "two files for mine.jsonl")
    refused(asked("--questions", mine, "--num-fewshot", 4, "--fewshot", f"mine.jsonl={shown}"), "needs 4", "has 3")
    refused(asked("--questions", mine, "--num-fewshot", 1, "--fewshot", f"mine.jsonl={mine}"), "8 of the 8 examples",
            "example 1 is question 1")  # fmt: skip
    refused(
        asked("--questions", mine, "--num-fewshot", 1, "--fewshot", "mine.jsonl=no.jsonl"), "no.jsonl does not exist"
    )
    # lm-eval draws one example more than it shows, lest it be the question.
    rows = [{"goal": "Tie", "sol1": "knot", "sol2": "cut", "label": label} for label in (0, 2)]
    few = ("--task", piqa, "--num-fewshot", 1, "--fewshot")
    refused(asked(*few, f"piqa={write_lines(tmp_path / 'one.jsonl', rows[:1])}"), "needs 2 examples", "has 1")
    told = "2 is not one of its 2 choices"
    refused(asked(*few, f"piqa={write_lines(tmp_path / 'two.jsonl', rows)}"), "example 2", told)
    subjects = [
        {"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 0, "subject": each} for each in ("x", "y")
    ]
    asks, shows = (write_lines(tmp_path / f"mmlu{n}.jsonl", rows) for n, rows in enumerate((subjects, [
        {**subjects[0], "question": "E?"}])))  # fmt: skip
    refused(asked("--task", f"mmlu={asks}", "--num-fewshot", 1, "--fewshot", f"mmlu={shows}"), "has 0 of y")


def test_other_ways_to_ask_that_make_no_sense(pico_model: Path, files: dict[str, Path], tmp_path: Path):
    def asked(*more: object, model: Path = pico_model):
        return sentei("evaluate", model, *more)

    for size, sentence in (
        ("0", "--batch-size 0 makes no sense"),
        ("-4", "makes no sense"),
        ("auto:4", "number, or auto"),
    ):
        refused(asked("--questions", files["mine"], "--batch-size", size), sentence)
    refused(asked("--text", files["text"], "--batch-size", 2), "--batch-size is for tasks and questions")
    bare = tmp_path / "bare"
    shutil.copytree(pico_model, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(asked("--questions", files["mine"], "--apply-chat-template", model=bare), "its tokenizer has none")


def hub_task(**splits: str | None):
    """lm-eval's own kind of task over the test's rows, with splits as a task of the hub might have them."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    rows = Dataset.from_list([{"q": f"{number}?", "choices": ["a", "b"], "answer": 0} for number in range(3)])
    data = DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
    return ConfigurableTask(
        config={"task": "hub", "custom_dataset": lambda **_: data, "output_type": "multiple_choice",
                "doc_to_text": "q", "doc_to_target": "answer", "doc_to_choice": "choices", **splits}
    )  # fmt: skip


def test_a_task_whose_only_examples_are_its_questions_is_refused():
    request = TaskRequest(name="hub", file=None, num_fewshot=2)
    apart = {"hub": hub_task(training_split="train", validation_split="validation")}
    set_examples(request, apart)
    assert example_source(request, apart) == "Hugging Face hub: train"
    assert apart["hub"].config.num_fewshot == 2
    for splits in ({"test_split": "test"}, {"validation_split": "validation"},
                   {"test_split": "test", "fewshot_split": "test"}):  # fmt: skip
        with pytest.raises(SenteiError, match="no examples but the questions that are asked"):
            set_examples(request, {"hub": hub_task(**splits)})
    with pytest.raises(SenteiError, match=r"needs 5 examples .* and hub has 3"):
        set_examples(TaskRequest(name="hub", file=None, num_fewshot=4), apart)
    # As in lm-eval: what is defined without examples has none, and 0 takes away those that a task is defined with.
    fixed = {"hub": hub_task(training_split="train", test_split="test", num_fewshot=0)}
    set_examples(request, fixed)
    assert (fixed["hub"].config.num_fewshot, example_source(request, fixed)) == (0, None)
    default = {"hub": hub_task(training_split="train", test_split="test", num_fewshot=3)}
    set_examples(TaskRequest(name="hub", file=None), default)
    assert default["hub"].config.num_fewshot == 3
    set_examples(TaskRequest(name="hub", file=None, num_fewshot=0), default)
    assert default["hub"].config.num_fewshot == 0


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
