"""No command replaces what it reads: texts and questions in the output directory survive --force."""

import json
from pathlib import Path

import pytest

from tests.command_line import refused, sentei
from tests.families import make_family_pico
from tests.serving.report.test_render import write_plan
from toolchain.errors import SenteiError
from toolchain.prune.apply import apply_plan
from toolchain.text.sources import TextSource


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_family_pico(directory, "llama", "grouped")
    return directory


PRUNE = ("prune", "MODEL", "--sparsity", 0.3)
SWEEP = ("prune", "MODEL", "--sweep", "0.1:0.3:0.1")
COMPARE = ("compare-methods", "MODEL")


@pytest.mark.parametrize(
    "command",
    [
        (*PRUNE, "--calibration", "TEXT"),
        (*PRUNE, "--calibration", "0.3:OTHER", "--calibration", "0.7:TEXT"),
        (*PRUNE, "--metric", "accuracy:QUESTIONS"),
        (*PRUNE, "--max-degradation", 1.1, "--limit-metric", "accuracy:QUESTIONS"),
        (*SWEEP, "--calibration", "TEXT"),
        (*SWEEP, "--metric", "accuracy:QUESTIONS"),
        ("heal", "MODEL", "--against", "MODEL", "--data", "TEXT"),
        ("evaluate", "MODEL", "--text", "TEXT"),
        ("evaluate", "MODEL", "--questions", "QUESTIONS"),
        ("evaluate", "MODEL", "--task", "arc_easy=QUESTIONS"),
        (*COMPARE, "--calibration", "TEXT", "--text", "OTHER"),
        (*COMPARE, "--text", "TEXT"),
        (*COMPARE, "--text", "OTHER", "--questions", "QUESTIONS"),
        ("quantize", "MODEL", "--scheme", "w4a16", "--calibration", "TEXT"),
    ],
    ids=lambda command: " ".join(map(str, command)),
)
def test_what_is_read_is_not_replaced(model: Path, tmp_path: Path, command: tuple):
    out = tmp_path / "out"
    out.mkdir()
    places = {
        "MODEL": model,
        "TEXT": out / "text.txt",
        "QUESTIONS": out / "questions.jsonl",
        "OTHER": tmp_path / "other.txt",
    }
    for name in ("TEXT", "OTHER"):
        places[name].write_text("Bread is baked from flour, water and salt. " * 20)
    places["QUESTIONS"].write_text(json.dumps({"prompt": "Bread is", "choices": [" baked", " wood"], "answer": 0}))
    before = sorted(tmp_path.rglob("*"))

    words = [str(word) for word in command]
    for name, path in places.items():
        words = [word.replace(name, str(path)) for word in words]
    refused(sentei(*words, "-o", out, "--force"), f"Output {out} would replace the input {out}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_is_not_applied_over_its_text(model: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("Bread is baked.")
    with pytest.raises(SenteiError, match="would replace the input"):
        apply_plan(None, model, tmp_path, calibration=[TextSource(text)], force=True)  # type: ignore[arg-type]
    assert text.is_file()


@pytest.mark.parametrize("out", [".", "/"])
@pytest.mark.parametrize(
    "command",
    [
        PRUNE,
        SWEEP,
        ("heal", "MODEL", "--against", "MODEL", "--data", "text.txt"),
        ("benchmark", "MODEL", "MODEL", "--engine", "transformers", "--input-len", 8, "--output-len", 4),
    ],
)
def test_an_output_without_a_name_of_its_own_is_refused_in_one_sentence(model: Path, command: tuple, out: str):
    words = [model if word == "MODEL" else word for word in command]
    refused(sentei(*words, "-o", out), f"Output {out} ")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (PRUNE, "--seed"),
        (COMPARE, "--seed"),
        (("heal", "MODEL", "--against", "MODEL", "--data", "text.txt"), "--seed"),
        (("evaluate", "MODEL", "--against", "MODEL", "--text", "text.txt"), "--generations"),
    ],
)
def test_numbers_below_zero_are_refused(model: Path, tmp_path: Path, command: tuple, option: str):
    words = [model if word == "MODEL" else word for word in command]
    refused(sentei(*words, "-o", tmp_path / "out", option, -1), option, "Invalid value")


def test_prompts_and_plans_in_the_output_stay(model: Path, tmp_path: Path):
    out, plan = tmp_path / "out", tmp_path / "out" / "plans" / "0.3"
    plan.mkdir(parents=True)
    write_plan(plan)
    (out / "prompts.jsonl").write_text('{"prompt": "Bread is", "output_tokens": 4}\n')
    before = sorted(tmp_path.rglob("*"))
    for words in (
        ("benchmark", model, model, "--engine", "vllm", "--prompts", out / "prompts.jsonl"),
        ("apply", plan, model),
        ("apply", plan / "plan.json", model),
    ):
        refused(sentei(*words, "-o", out, "--force"), f"Output {out} would replace the input {out}")
    assert sorted(tmp_path.rglob("*")) == before
