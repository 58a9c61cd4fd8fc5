"""Every mistake that a person makes in ``poc.yaml`` gives the line and the fix."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.decision.document import GuardRails
from serving.poc.document import EvaluationSettings, PocDocument
from serving.poc.read import read_poc
from serving.poc.template import template
from tests.test_form import ROOT
from toolchain.errors import SenteiError
from toolchain.yaml_lines import read_yaml

GOOD = """\
version: 1
language: en
model: models/own
calibration:
  text: [calibration.txt]
  samples: 16
evaluation:
  text: [evaluation.txt]
  questions: [own.jsonl]
engine: onnx
workload:
  input_len: 512
  output_len: 128
guard_rails:
  most_perplexity: 1.2
  least_gain: 1.1
  groups:
    safety: 0.9
candidates:
  sparsities: [0.125, 0.25]
alternatives:
  quantised: [int8]
"""

SAFE = "    safety: 0.9\n  metrics"
MISTAKES = [
    # What is written for what, the line, and parts of what is said.
    ("most_perplexity", "most_perplexty", 15, "most_perplexty is not known", "Did you mean most_perplexity?"),
    ("guard_rails:", "guardrails:", 14, "guardrails is not known", "Did you mean guard_rails?"),
    ("  samples: 16", "  sample: 16", 6, "sample is not known in calibration", "Did you mean samples?"),
    ("  least_gain: 1.1", "  repeats: 5", 16, "repeats is not known in guard_rails", "It belongs below workload."),
    ("  samples: 16", "  engine: onnx", 6, "engine is not known in calibration", "Write it at the left margin."),
    ("model: models/own\n", "", 1, "model is missing", "Add model:"),
    ("  output_len: 128\n", "", 11, "workload has no output_len", "Add output_len:"),
    ("[0.125, 0.25]", "[12.5, 25]", 20, "for 25 % write 0.25, not 12.5", ""),
    ("[0.125, 0.25]", "[25 %]", 20, "candidates.sparsities.0 is '25 %'", "Write a number."),
    ("[0.125, 0.25]", "0.25", 20, "candidates.sparsities is 0.25", "Write a list, such as [a, b]."),
    ("[0.125, 0.25]", "[0.25, 0.25]", 20, "0.25 stands here twice", ""),
    ("[0.125, 0.25]", "[0.25, 0.2500001]", 20, "0.25 stands here twice", ""),
    ("[0.125, 0.25]", "[]", 20, "candidates.sparsities is empty", "Write one at least."),
    ("most_perplexity: 1.2", "most_perplexity: 0.9", 15, "most_perplexity is 0.9", "at least 1"),
    ("most_perplexity: 1.2", "most_perplexity: 1,2", 15, "most_perplexity is '1,2'", "Write a number."),
    ("most_perplexity: 1.2", "most_perplexity: 20 %", 15, "most_perplexity is '20 %'", "Write a number."),
    ("safety: 0.9", "safety: 90", 18, "guard_rails.groups.safety is 90", "at most 1"),
    ("    safety: 0.9", f"{SAFE}: {{refusal_rate:q.jsonl: 0.9}}", 19, "refusals are good or bad", "wanted=refusals"),
    ("    safety: 0.9", f"{SAFE}: {{perplexity: 0.9}}", 19, "perplexity is no metric of questions", "accuracy:FILE"),
    ("    safety: 0.9", f"{SAFE}:\n    valid_json:q.jsonl: 90", 20, "is 90", "at most 1"),
    ("    safety: 0.9", f"{SAFE}: {{f1:a/q#class=b: 0.9, f1:q#class=b: 0.8}}", 19, "called f1:q#class=b", "rename"),
    ("engine: onnx", "engine: ollama", 10, "engine is 'ollama'", "Write onnx or vllm."),
    ("version: 1", "version: 2", 1, "version is 2", "Write 1."),
    ("input_len: 512", "input_len: 512.5", 12, "workload.input_len is 512.5", "Write a whole number."),
    ("input_len: 512", "input_len: -1", 12, "workload.input_len is -1", "at least 1"),
    ("  input_len: 512", "  input_len: 512\n  repeats: 1", 13, "workload.repeats is 1", "at least 3"),
    ("  input_len: 512", "  input_len: 512\n  limits: {attainment: 0.9}", 13, "no limit is given", ""),
    ("text: [calibration.txt]", "text: calibration.txt", 5, "calibration.text is 'calibration.txt'", "Write a list"),
    ("text: [calibration.txt]", "text: [CHANGE_ME/calibration.txt]", 5, "CHANGE_ME is still there", ""),
    ("model: models/own", "model:", 3, "model is empty", "Write a text."),
    ("model: models/own", "model: --force", 3, "must not begin with a dash", ""),
    ("[int8]", "[fp8]", 21, "engine onnx has no fp8", "write int8 or int4"),
    ("[int8]", "[int9]", 22, "'int9'", "Write int8, int4 or fp8."),
    ("  questions: [own.jsonl]\n", "", 13, "names no file of questions", ""),
    ("workload:\n", "engine: vllm\nworkload:\n", 11, "engine is given twice, first in line 10", ""),
    ("  samples: 16", "\tsamples: 16", 6, "this is not YAML", "Indent with spaces"),
    ("  samples: 16", "  samples 16", 7, "this is not YAML", "a space after the colon"),
    ("model: models/own", "model: *other", 3, "alias *other is not read", ""),
    ("engine: onnx", "engine: !!python/name:os.system onnx", 10, "tags such as", ""),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "line", "what", "fix"), MISTAKES)
def test_a_mistake_is_told_with_its_line_and_what_to_write(right, wrong, line, what, fix, tmp_path):
    assert right in GOOD
    path = tmp_path / "poc.yaml"
    path.write_text(GOOD.replace(right, wrong, 1), encoding="utf-8")
    with pytest.raises(SenteiError) as error:
        read_poc(path)
    assert f"poc.yaml line {line}: " in str(error.value)
    assert what in str(error.value)
    assert fix in str(error.value)


def test_a_metrics_name_is_read_with_its_group_whole(tmp_path):
    """In YAML, # begins a comment only behind a space."""
    path = tmp_path / "poc.yaml"
    metrics = "  metrics:\n    refusal_rate:q.jsonl#group=有給 休暇,wanted=answers: 0.05\n    f1:q.jsonl#class=a: 0.5\n"
    path.write_text(GOOD.replace("  groups:\n", f"{metrics}  groups:\n"), encoding="utf-8")
    limits = {"refusal_rate:q.jsonl#group=有給 休暇,wanted=answers": 0.05, "f1:q.jsonl#class=a": 0.5}
    assert read_poc(path).guard_rails.metrics == limits


def test_a_good_file_is_read_as_it_is_meant(tmp_path):
    path = tmp_path / "poc.yaml"
    path.write_text(GOOD, encoding="utf-8")
    poc = read_poc(path)
    assert poc.candidates.sparsities == [0.125, 0.25]
    assert poc.guard_rails.groups == {"safety": 0.9}
    assert poc.workload.repeats == 5


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_template_needs_nothing_but_what_it_asks_for(language, tmp_path):
    path = tmp_path / "poc.yaml"
    path.write_text(template(language), encoding="utf-8")
    with pytest.raises(SenteiError, match="CHANGE_ME is still there"):
        read_poc(path)
    path.write_text(template(language).replace("CHANGE_ME", "own"), encoding="utf-8")
    assert read_poc(path).language == language


@pytest.mark.parametrize("language", ["en", "ja"])
def test_every_line_that_the_template_has_commented_out_is_right_too(language, tmp_path):
    """A person takes the # away; a key that does not exist would be refused."""
    text = template(language).replace("CHANGE_ME", "own").replace("questions: []", "questions: [q.jsonl]")
    lines = []
    for line in text.splitlines():
        bare = line.strip().removeprefix("# ")
        key = bare.partition(":")[0]
        is_key = line.strip().startswith("# ") and line.startswith("  ") and key.replace("_", "").isalpha()
        lines.append(line.replace("# ", "", 1) if is_key and ":" in bare else line)
    # What follows a key with two spaces of its own stands below it.
    opened = re.sub("#   (safety|refusal_rate|f1|valid_json):", r"  \1:", "\n".join(lines))
    assert opened.count("#") < text.count("#") - 8
    path = tmp_path / "poc.yaml"
    path.write_text(opened, encoding="utf-8")
    poc = read_poc(path)
    assert poc.workload.limits and poc.guard_rails.groups == {"safety": 0.9} and poc.capacity.memory_gb == 80


def test_yaml_means_what_it_looks_like(tmp_path):
    """In YAML 1.1 ``no`` is false, ``12:30`` a number and ``1e3`` a text."""
    path = tmp_path / "x.yaml"
    path.write_text("a: no\nb: 12:30\nc: 1e3\nd: 0x10\ne: 1_000\nf: '1'\ng: true\nh: .5\ni: 2026-01-01\nj: ~\n")
    found = read_yaml(path)
    assert found.content == {
        "a": "no", "b": "12:30", "c": 1000.0, "d": "0x10", "e": "1_000", "f": "1", "g": True, "h": 0.5,
        "i": "2026-01-01", "j": None,
    }  # fmt: skip
    assert found.line_of(("c",)) == 3


def test_a_few_lines_cannot_take_all_memory(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{k}: &{k} [{'*a,' * 9}]\n" for k in "bcdefgh"))
    with pytest.raises(SenteiError, match="line 2"):
        read_yaml(path)
    for deep in ("[" * 1000, "{a: " * 1000, "- " * 1000):
        path.write_text(deep)
        with pytest.raises(SenteiError):
            read_yaml(path)
    path.write_text("a: b\n" * 100_000)
    with pytest.raises(SenteiError, match="bytes"):
        read_yaml(path)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200) | st.lists(st.sampled_from("ab: -[]{}\n\t'\"#&*!|>%0.1,~?"), max_size=60).map("".join))
def test_any_text_is_read_or_refused_in_one_sentence(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        read_poc(path)
    except SenteiError as error:
        assert str(error)


def test_the_schema_for_editors_knows_every_key():
    assert set(PocDocument.model_json_schema()["properties"]) == set(PocDocument.model_fields)


def test_the_japanese_guide_names_every_key_that_the_english_one_names():
    """Who reads one of them alone would leave out, say, the chat template, and measure refusals of raw text."""
    keys = {*EvaluationSettings.model_fields, *GuardRails.model_fields}
    english, japanese = (keys & words_in_code(ROOT / "docs" / folder / "poc.md") for folder in ("guides", "ja"))
    assert {"chat_template", "tasks", "metrics", "most_memory_gb"} <= english <= japanese


def words_in_code(page: Path) -> set[str]:
    spans = re.findall(r"```.*?```|`[^`\n]+`", page.read_text(encoding="utf-8"), re.DOTALL)
    return {word for span in spans for word in re.findall(r"\w+", span)}
