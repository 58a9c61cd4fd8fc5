"""What sentei reads is what a server reads: the tokens it makes of the same text or chat, from the first one on.

The server's side is asked of the tokenizer alone, as vLLM and the ONNX server do: ``tokenizer(prompt)`` for a prompt,
``apply_chat_template`` for a chat.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow.parquet import write_table
from transformers import PreTrainedTokenizerBase

from serving.verify.verify import _prompts
from tests.command_line import PLAIN, refused, sentei
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.evaluate import run as evaluation_run
from toolchain.evaluate import writing as damage
from toolchain.evaluate.lm_eval_model import ServedHFLM
from toolchain.evaluate.lm_eval_tasks import load_task, run_task
from toolchain.evaluate.task_requests import TaskRequest
from toolchain.metrics.accuracy import ChoicesMetric
from toolchain.metrics.question_metrics import QuestionMetric
from toolchain.metrics.questions import load_questions
from toolchain.metrics.token_metrics import measure
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import bos_of, load_model, load_tokenizer
from toolchain.parts_cache import Parts
from toolchain.plan.plan import load_plan
from toolchain.prune.apply import apply_plan
from toolchain.prune.methods import METHODS
from toolchain.prune.pipeline import PruneSettings, prune
from toolchain.text import self_written
from toolchain.text.chat_template import ChatTemplate
from toolchain.text.embedded import documents
from toolchain.text.passages import number_passages
from toolchain.text.sources import TextSource
from toolchain.text.windows import load_mixture, load_windows

BOS, EOS = "<|endoftext|>", "<|im_end|>"
# What a tokenizer puts around a text, by the kind of tokenizer; the demo model's puts nothing there.
TEMPLATES = {"plain": None, "bos": [BOS, "A"], "bos and eos": [BOS, "A", EOS], "eos": ["A", EOS]}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    [{"role": "user", "content": f"What is {n} times {n}?"}, {"role": "assistant", "content": f"It is {n * n}."},
     {"role": "user", "content": "Are you sure?"}, {"role": "assistant", "content": "Yes."}]
    for n in range(2, 40)
]  # fmt: skip
QUESTIONS = [
    {"prompt": "The capital of France is", "choices": ["Paris", "a very long and wrong answer"], "answer": 0},
    *({"prompt": f"{n} and {n} make", "choices": [f"{2 * n} things", f"number {n}"], "answer": 0} for n in range(6)),
]


def special(tokenizer: Any, token: str) -> dict[str, Any]:
    return {"id": token, "ids": [tokenizer["vocab"][token]], "tokens": [token]}


def change_tokenizer(directory: Path, around: list[str] | None, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Gives a model directory a tokenizer as Llama 3 has one: a post-processor that puts tokens around each text."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = {**tokenizer["model"]["vocab"], **{each["content"]: each["id"] for each in tokenizer["added_tokens"]}}
    if around:
        pieces = [
            {"Sequence": {"id": "A", "type_id": 0}} if each == "A" else {"SpecialToken": {"id": each, "type_id": 0}}
            for each in around
        ]
        known = {each: special({"vocab": vocabulary}, each) for each in around if each != "A"}
        template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": known}
        tokenizer["post_processor"] = template
        path.write_text(json.dumps(tokenizer))
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        settings |= {"bos_token": BOS, "tokenizer_class": "PreTrainedTokenizerFast"}
        settings.pop("chat_template", None)
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    if chat_template:
        (directory / "chat_template.jinja").write_text(chat_template)


@pytest.fixture(scope="module")
def models(demo_pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pico model with each kind of tokenizer."""
    directory = tmp_path_factory.mktemp("served")
    for kind, around in TEMPLATES.items():
        shutil.copytree(demo_pico, directory / kind)
        change_tokenizer(directory / kind, around)
    return {kind: directory / kind for kind in TEMPLATES}


@pytest.fixture(scope="module")
def llama(models: dict[str, Path]) -> Path:
    """The one like Llama 3's: BOS in front."""
    return models["bos"]


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> PreTrainedTokenizerBase:
    """Its tokenizer, of which it is sure that it begins every text with BOS."""
    found = load_tokenizer(llama)
    assert found("a")["input_ids"][0] == found("")["input_ids"][0] == found.bos_token_id == 0
    return found


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "prose.jsonl"
    texts = [each[:600] for each in documents() if len(each) > 800][:6]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in CHATS))
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "questions.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    return path


def served_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **more: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **more)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def bos_for(model: Path, tokenizer: PreTrainedTokenizerBase) -> int | None:
    return bos_of(open_checkpoint(model).family, tokenizer)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_text_is_read_as_it_is_served(kind: str, models: dict[str, Path], prose: Path, questions: Path):
    model, asked = models[kind], load_tokenizer(models[kind])
    document = json.loads(prose.read_text().splitlines()[0])["text"]
    served = asked(document)["input_ids"]
    bos = bos_for(model, asked)
    assert (bos is None) == ("bos" not in kind)
    windows = load_windows(prose, asked, num_samples=4, seq_len=32, bos=bos)
    assert windows.ids.shape == (4, 32)
    assert windows.ids[0].tolist() == served[:32]
    assert {row[0] for row in windows.ids.tolist()} == {served[0]} or bos is None
    # Nothing of the text is lost between windows, and no special token stands within it.
    both = document + "\n\n" + json.loads(prose.read_text().splitlines()[1])["text"]
    stream = asked(both, add_special_tokens=False)["input_ids"]
    assert windows.text_ids.flatten().tolist() == stream[: windows.text_ids.numel()]
    assert _prompts(open_checkpoint(model), prose, long=False)[0][:32] == served[:32]
    metric = ChoicesMetric(
        load_questions(questions), asked, asked=QuestionMetric(kind="accuracy", file=Path("q")), seq_len=64, bos=bos
    )
    prompts = [asked(f"{each['prompt']} {choice}")["input_ids"] for each in QUESTIONS for choice in each["choices"]]
    end = kind.endswith("eos")  # which is the end of a prompt, and not of what is compared
    rows = [row[: len(prompt) - end] for row, prompt in zip(metric.ids.tolist(), prompts, strict=True)]
    assert rows == [prompt[: len(prompt) - end] for prompt in prompts]


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bos", "bos and eos", "plain"])
def test_tasks_are_asked_as_they_are_served(kind: str, models: dict[str, Path], questions: Path):
    asked, model = load_tokenizer(models[kind]), load_model(models[kind])
    task = load_task(TaskRequest(name="questions", file=questions))
    found = run_task(model, asked, task, limit=3, bos=bos_for(models[kind], asked))
    for question, answered in zip(QUESTIONS, found["questions"], strict=False):
        start = len(asked(question["prompt"])["input_ids"]) - kind.endswith("eos")
        for choice, log_likelihood in zip(question["choices"], answered["log_likelihoods"], strict=True):
            ids = asked(f"{question['prompt']} {choice}")["input_ids"]
            ids = ids[: len(ids) - kind.endswith("eos")]
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))
            assert log_likelihood == pytest.approx(expected, abs=1e-3)
    assert found["num_cut"] == 0


def test_two_tokens_in_front_are_one_sentence(models: dict[str, Path], demo_pico: Path, tmp_path: Path):
    shutil.copytree(demo_pico, tmp_path / "model")
    change_tokenizer(tmp_path / "model", [BOS, "<|im_start|>", "A"])
    with pytest.raises(SenteiError, match=r"puts 2 tokens before every text \(<\|endoftext\|> <\|im_start\|>\)"):
        bos_for(tmp_path / "model", load_tokenizer(tmp_path / "model"))


@torch.inference_mode()
def test_perplexity_and_generation_begin_as_served(
    llama: Path, tokenizer: PreTrainedTokenizerBase, prose: Path, questions: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    given: list[torch.Tensor] = []
    describe = damage.describe_original

    def described(model: Any, prompts: Any) -> damage.Reference:
        given.extend(prompts)
        return describe(model, prompts)

    monkeypatch.setattr(damage, "describe_original", described)
    shutil.copytree(llama, tmp_path / "same")
    done = sentei(
        "evaluate", tmp_path / "same", "--against", llama, "--text", prose, "--seq-len", 64, "--windows", 1,
        "--questions", questions, "--limit", 1, "--generations", 1, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    document = json.loads(prose.read_text().splitlines()[0])["text"]
    ids = tokenizer(document, return_tensors="pt")["input_ids"][:, :64]
    loss = load_model(llama)(ids, labels=ids).loss
    assert found["evaluations"][0]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert [(each["bos"], each["chat_template"]) for each in found["evaluations"]] == [(0, False)] * 2
    assert [(each["bos"], each["chat_template"], each["num_cut"]) for each in found["tasks"]] == [(0, False, 0)] * 2
    [prompt] = given
    assert prompt.tolist() == tokenizer(found["generation"]["samples"][0]["prompt"])["input_ids"]


def test_models_that_are_served_differently_are_not_compared(
    models: dict[str, Path], prose: Path, questions: Path, chats: Path, tmp_path: Path
):
    against = ("evaluate", models["bos"], "--seq-len", 16, "--windows", 2, "--against")
    sentence = "plain is served with no token before each text, and bos with token 0 (<|endoftext|>)"
    refused(sentei(*against, models["plain"], "--text", prose), sentence)
    shutil.copytree(models["bos"], tmp_path / "other")
    change_tokenizer(tmp_path / "other", TEMPLATES["bos"], CHAT_TEMPLATE.replace("im_start", "endoftext"))
    refused(sentei(*against, tmp_path / "other", "--text", chats), "other and bos have different chat templates")
    refused(
        sentei(*against, tmp_path / "other", "--questions", questions, "--chat-template"), "different chat templates"
    )


def test_chats_are_read_as_they_are_served(llama: Path, tokenizer: PreTrainedTokenizerBase, chats: Path, prose: Path):
    served = [served_chat(tokenizer, each) for each in CHATS]
    assert all(each[0] == 0 for each in served)
    windows = load_windows(chats, tokenizer, num_samples=None, seq_len=50, bos=0)
    assert windows.holds_chats and windows.bos == 0
    assert windows.ids[0].tolist() == [*served[0], *served[1][1:]][:50]
    assert set(windows.ids[:, 0].tolist()) == {0}
    # One chat follows another, and BOS stands at the beginning alone.
    stream = [token for each in served for token in each[1:]]
    assert windows.text_ids.flatten().tolist() == stream[: windows.text_ids.numel()]
    assert len(stream) - windows.text_ids.numel() < 49
    few = load_windows(chats, tokenizer, num_samples=3, seq_len=50, bos=0)
    assert torch.equal(few.ids, windows.ids[:3])
    unit, numbers = number_passages(chats, tokenizer, windows.text_ids)
    assert unit == "document"
    assert numbers.flatten().bincount()[:5].tolist() == [len(each) - 1 for each in served[:5]]
    mixed = load_mixture([TextSource(chats), TextSource(prose)], tokenizer, num_samples=4, seq_len=50, bos=0)
    assert mixed.ids[0].tolist() == windows.ids[0].tolist()


def test_a_turn_that_begins_with_the_bos_token_stays_whole(demo_model: Path, chats: Path):
    """The demo model's template begins each turn with the token that its tokenizer calls BOS."""
    asked = load_tokenizer(demo_model)
    served = [token for each in CHATS for token in served_chat(asked, each)]
    assert served[0] == asked.bos_token_id
    windows = load_windows(chats, asked, num_samples=5, seq_len=64, bos=bos_for(demo_model, asked))
    assert windows.bos is None
    assert windows.ids.flatten().tolist() == served[: 5 * 64]


def test_a_template_without_bos_is_served_without_it(models: dict[str, Path], chats: Path, prose: Path, tmp_path: Path):
    shutil.copytree(models["bos"], tmp_path / "model")
    change_tokenizer(tmp_path / "model", TEMPLATES["bos"], CHAT_TEMPLATE.removeprefix("{{ bos_token }}"))
    asked = load_tokenizer(tmp_path / "model")
    windows = load_windows(chats, asked, num_samples=2, seq_len=40, bos=0)
    assert windows.bos is None
    assert windows.ids[0].tolist() == [*served_chat(asked, CHATS[0]), *served_chat(asked, CHATS[1])][:40]
    with pytest.raises(SenteiError, match="Texts begin with BOS and chats do not"):
        load_mixture([TextSource(chats), TextSource(prose)], asked, num_samples=4, seq_len=20, bos=0)


def test_generation_answers_chats_as_they_are_served(
    llama: Path, tokenizer: PreTrainedTokenizerBase, chats: Path, monkeypatch: pytest.MonkeyPatch
):
    given: list[list[list[int]]] = []

    def described(model: Any, prompts: Any) -> damage.Reference:
        given.append([each.tolist() for each in prompts])
        raise SenteiError("Read.")

    monkeypatch.setattr(damage, "describe_original", described)
    settings = evaluation_run.EvaluationSettings(
        texts=(chats,), num_windows=2, seq_len=32, num_generations=3, device="cpu", dtype=torch.float32
    )
    with pytest.raises(SenteiError, match="Read"):
        evaluation_run.evaluate(llama, llama, settings, Parts(None))
    assert given == [[served_chat(tokenizer, each[:1], add_generation_prompt=True) for each in CHATS[:3]]]
    model = load_model(llama)
    ids = [torch.tensor(each) for each in given[0]]
    assert len({len(each) for each in ids}) > 1 or len(ids) == 3
    written = damage.continue_greedily(model, ids)
    assert written == [damage.continue_greedily(model, each[None])[0] for each in ids]


@torch.inference_mode()
def test_questions_through_the_chat_template_are_asked_as_they_are_served(
    llama: Path, tokenizer: PreTrainedTokenizerBase, questions: Path
):
    model = load_model(llama)
    task = load_task(TaskRequest(name="questions", file=questions), chat_template=True)
    found = run_task(model, tokenizer, task, limit=None, bos=0, chat_template=True)["questions"]
    rows = []
    for question, answered in zip(QUESTIONS, found, strict=True):
        prompt = served_chat(tokenizer, [{"role": "user", "content": question["prompt"]}], add_generation_prompt=True)
        assert prompt[0] == 0 and prompt.count(0) == 1
        for choice, log_likelihood in zip(question["choices"], answered["log_likelihoods"], strict=True):
            ids = [*prompt, *tokenizer(choice, add_special_tokens=False)["input_ids"]]
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logs[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))
            assert log_likelihood == pytest.approx(expected, abs=1e-3)
            rows.append(ids)
        assert answered["question"] == question["prompt"]
    metric = ChoicesMetric(
        load_questions(questions),
        tokenizer,
        asked=QuestionMetric(kind="accuracy", file=Path("q")),
        seq_len=64,
        bos=0,
        chat_template=True,
    )
    assert metric.source == "q, in the chat template"
    assert [row[: len(ids)] for row, ids in zip(metric.ids.tolist(), rows, strict=True)] == rows
    right = [each["scores"]["acc_norm"] for each in found]
    assert measure(LayerWalk(model, open_checkpoint(llama).family), metric) == sum(right) / len(right)


def test_what_the_context_cuts_is_counted_and_keeps_bos(
    llama: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    long = {"prompt": "many words " * 300 + "end", "choices": ["one", "two"], "answer": 0}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [long, *QUESTIONS]))
    done = sentei("evaluate", llama, "--questions", tmp_path / "q.jsonl", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = "q.jsonl: 2 prompts are longer than the model's context and lost their beginning."
    assert said in " ".join(done.stdout.split())
    [task] = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]
    assert task["num_cut"] == 2
    lm = ServedHFLM(load_model(llama), tokenizer, 0, None, lambda: None, 4)
    ids, mask = lm.tok_batch_encode(["many words " * 9, "few"], left_truncate_len=8)
    whole = tokenizer("many words " * 9)["input_ids"]
    assert ids[0].tolist() == [0, *whole[-7:]]
    assert ids[1][mask[1].bool()].tolist() == tokenizer("few")["input_ids"]
    assert lm.num_cut == 1
    long = {"prompt": "a", "choices": ["b", "many words " * 300], "answer": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(long) + "\n")
    refused(
        sentei("evaluate", llama, "--questions", tmp_path / "q.jsonl"), "A choice is longer than the model's context"
    )


def settings(text: Path, method: str) -> PruneSettings:
    return PruneSettings(
        sparsity=0.3, calibration=[TextSource(text)], num_samples=4, seq_len=24, align=8, attention_removals=1,
        device="cpu", dtype=torch.float32, seed=0, **METHODS[method].settings,
    )  # fmt: skip


def test_a_plan_says_how_its_text_was_read_and_is_applied_so(
    llama: Path, tokenizer: PreTrainedTokenizerBase, prose: Path, chats: Path, tmp_path: Path
):
    for text, is_chat in ((prose, False), (chats, True)):
        prune(llama, out := tmp_path / text.stem, settings(text, "sentei"), model_name="llama")
        record = load_plan(out).document.calibration
        assert (record.bos, record.chat_template) == (0, is_chat)
        windows = load_windows(text, tokenizer, num_samples=4, seq_len=24, bos=0)
        assert record.sha256 == windows.sha256
        apply_plan(load_plan(out), llama, tmp_path / f"{text.stem}-again", calibration=[TextSource(text)])
        written, again = (each / "model.safetensors" for each in (out, tmp_path / f"{text.stem}-again"))
        assert written.read_bytes() == again.read_bytes()


def test_the_published_method_and_plans_from_before_read_without_bos(
    llama: Path, tokenizer: PreTrainedTokenizerBase, prose: Path, tmp_path: Path
):
    without = load_windows(prose, tokenizer, num_samples=4, seq_len=24)
    prune(llama, tmp_path / "2ssp", settings(prose, "2ssp"), model_name="llama")
    record = load_plan(tmp_path / "2ssp").document.calibration
    assert (record.bos, record.sha256) == (None, without.sha256)
    before = replace(settings(prose, "sentei"), as_served=False)
    prune(llama, out := tmp_path / "before", before, model_name="llama")
    plan = json.loads((out / "plan.json").read_text())
    assert plan["calibration"].pop("bos", 1) is None
    del plan["calibration"]["chat_template"]
    (out / "plan.json").write_text(json.dumps(plan))
    apply_plan(load_plan(out), llama, tmp_path / "again", calibration=[TextSource(prose)])


def test_a_model_writes_from_the_token_that_its_prompts_begin_with(llama: Path, monkeypatch: pytest.MonkeyPatch):
    begun: list[int] = []

    def write(model: Any, tokenizer: Any, start: int, *_: Any) -> list[str]:
        begun.append(start)
        return ["many words"]

    monkeypatch.setattr(self_written, "_write_batch", write)
    asked = self_written.WritingSettings(
        num_tokens=1, max_new_tokens=4, batch_size=1, temperature=1.0, seed=0, device="cpu", dtype=torch.float32
    )
    self_written.write_documents(llama, asked, Parts(None))
    assert begun == load_tokenizer(llama)("")["input_ids"]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"messages": []}], 'field "messages" is not a list of messages'),
        ([{"messages": "Hello"}], 'field "messages" is not a list of messages'),
        ([{"messages": [{"content": "Hello"}]}], "is not an object with a"),
        ([{"messages": CHATS[0], "tools": "none"}], 'field "tools" is not a list of objects'),
        ([{"messages": CHATS[0]}, {"text": "Hello"}], "rows.jsonl holds both texts and chats"),
        ([{"text": "Hello"}, {"messages": CHATS[0]}], "rows.jsonl holds both texts and chats"),
        ([{"other": 1}], 'is not a JSON object with a field "text" or "messages"'),
        ([{"messages": CHATS[0]}], "rows.jsonl is too short"),
    ],
)
def test_bad_chats_are_one_sentence(rows: list[Any], sentence: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(SenteiError, match=sentence):
        load_windows(tmp_path / "rows.jsonl", tokenizer, num_samples=90, seq_len=24, bos=0)


def test_what_a_template_refuses_is_one_sentence(models: dict[str, Path], chats: Path, tmp_path: Path):
    shutil.copytree(models["bos"], tmp_path / "model")
    change_tokenizer(tmp_path / "model", None, "{{ raise_exception('Only one turn.') if messages | length > 1 }}")
    with pytest.raises(SenteiError, match=r"chats.jsonl, chat 1: .*refuses them \(Only one turn.\)"):
        load_windows(chats, load_tokenizer(tmp_path / "model"), num_samples=1, seq_len=24)
    change_tokenizer(tmp_path / "model", None, None)
    with pytest.raises(SenteiError, match=r"chats.jsonl holds chats, which need the model's chat template"):
        load_windows(chats, load_tokenizer(tmp_path / "model"), num_samples=1, seq_len=24)


def test_a_template_that_writes_the_date_gives_the_same_windows_tomorrow(
    models: dict[str, Path], chats: Path, tmp_path: Path
):
    shutil.copytree(models["bos"], tmp_path / "model")
    now = "{{ strftime_now('%Y %H:%M:%S.%f') }}"
    change_tokenizer(tmp_path / "model", None, now + "{% for message in messages %}{{ message.content }}{% endfor %}")
    tokenizer = load_tokenizer(tmp_path / "model")
    one, other = (load_windows(chats, tokenizer, num_samples=2, seq_len=16).sha256 for _ in range(2))
    assert one == other
    # A server says what the clock says.
    with ChatTemplate(tokenizer) as template:
        assert template.render([{"role": "user", "content": ""}])[:4] > "2024"


def test_tables_of_chats_read_as_lines_do(tokenizer: PreTrainedTokenizerBase, chats: Path, tmp_path: Path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    write_table(pyarrow.Table.from_pylist([{"messages": each, "id": 1} for each in CHATS]), tmp_path / "chats.parquet")
    lines, table = (
        load_windows(path, tokenizer, num_samples=6, seq_len=40, bos=0) for path in (chats, tmp_path / "chats.parquet")
    )
    assert torch.equal(lines.ids, table.ids)
    from toolchain.text.sources import read_documents

    write_table(pyarrow.Table.from_pylist([{"messages": [*CHATS[0], call]}]), tmp_path / "calls.parquet")
    [chat] = read_documents(tmp_path / "calls.parquet")
    assert not isinstance(chat, str)
    assert chat.messages == [*CHATS[0], call]


def test_the_option_without_questions_is_refused(llama: Path, prose: Path, tmp_path: Path):
    sentence = "chats in a text (field messages) go through the chat template by themselves"
    refused(sentei("evaluate", llama, "--text", prose, "--seq-len", 16, "--chat-template"), sentence)
    refused(sentei("prune", llama, "-o", tmp_path / "out", "--sparsity", 0.3, "--align", 8, "--calibration", prose,
                   "--samples", 2, "--seq-len", 16, "--chat-template", *PLAIN), sentence)  # fmt: skip
