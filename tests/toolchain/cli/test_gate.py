"""``sentei gate`` as an operator's script uses it: exit codes, one JSON object, one command on promotion."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from serving.gate.document import GateDocument
from tests.command_line import refused, sentei
from tests.serving.gate.fake_prometheus import Answer, knows, prometheus, series_of
from tests.serving.gate.world import Truth, pair
from tests.test_form import ROOT
from toolchain.yaml_documents import read_yaml_document

WINDOW_S = 1200
GATE = """version: 1
original:
  job: original
candidate: {job: candidate}
window: 20m
looks: 1
"""
CANDIDATES = {
    "promote": (Truth(ttft_s=0.1, tpot_s=0.025), (8000, 8000), 0),
    "roll_back": (Truth(errors=0.05), (8000, 8000), 1),
    "wait": (Truth(), (8000, 400), 3),
}


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    path = tmp_path / "gate.yaml"
    path.write_text(GATE)
    return path


def known(kind: str) -> Answer:
    candidate, requests, _ = CANDIDATES[kind]
    sides = pair(np.random.default_rng(0), Truth(), candidate, requests=requests)
    return knows(
        {job: series_of(side, job, WINDOW_S) for job, side in zip(("original", "candidate"), sides, strict=True)}
    )


def touching(path: Path) -> str:
    return f"{sys.executable} -c 'import sys, pathlib; print(1); pathlib.Path(sys.argv[1]).touch()' '{path}'"


@pytest.mark.parametrize("kind", CANDIDATES)
def test_the_answer_is_the_exit_code(gate, tmp_path, kind):
    applied = tmp_path / "a name with $(spaces)"
    with prometheus(known(kind)) as (url, asked):
        done = sentei("gate", gate, "--prometheus", url, "--json", "--apply", touching(applied))
        shown = sentei("gate", gate, "--prometheus", url)
    assert (done.returncode, shown.returncode) == (CANDIDATES[kind][2],) * 2, done.stderr + shown.stderr
    assert len(asked) == 6
    found = json.loads(done.stdout)
    assert found["decision"] == kind
    assert applied.exists() == (kind == "promote")
    assert shown.stdout.startswith(found["sentence"])
    assert found["sentence"].startswith(kind.replace("_", " ").capitalize())
    assert f"{found['requests']['candidate']:,} requests of the candidate" in found["sentence"]
    if kind == "roll_back":
        worse = {check["name"]: check["interval"] for check in found["checks"] if check["state"] == "worse"}
        assert worse.keys() == {"error_answers", "unfinished"}
        assert 0.01 < worse["error_answers"]["low"] < 0.05 < worse["error_answers"]["high"] < 0.1
        assert "answers with status 4xx or 5xx +" in found["sentence"]


def test_a_command_that_fails_is_told(gate):
    with prometheus(known("promote")) as (url, _):
        done = sentei("gate", gate, "--prometheus", url, "--apply", f"{sys.executable} -c 'raise SystemExit(7)'")
    assert done.returncode == 2
    assert "ended with exit code 7" in done.stderr


@pytest.mark.parametrize(
    ("command", "said"), [("no-such-program x", "no-such-program"), ("'", "split"), ("  ", "no command")]
)
def test_a_command_that_cannot_run_is_told_before_anything_is_asked(gate, command, said):
    refused(sentei("gate", gate, "--prometheus", "http://127.0.0.1:1", "--apply", command), "--apply", said)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("window: 20m", "window: 20", ("line 5", "90s, 30m or 2h")),
        ("window: 20m", "window: 30s", ("line 5", "120 seconds at least")),
        ("job: candidate", "job: original", ("can name the same servers",)),
        ("job: candidate", "model_name: x", ("can name the same servers",)),
        ("job: original", "job: ''", ("line 2", "job is empty")),
        ("job: original", "my-job: x", ("line 2", "no name of a label")),
        ("looks: 1", "errors: {max_increase: 0}", ("line 6", "more than 0")),
        ("looks: 1", "error: {max_increase: 0.1}", ("line 6", "Did you mean errors?")),
        ("looks: 1", "max_ratio: 1.2", ("line 6", "It belongs below ttft.")),
        ("looks: 1", "ttft: {max_ratio: fast}", ("line 6", "Write a number.")),
        ("looks: 1", "looks: true", ("line 6", "a whole number")),
        ("version: 1\n", "", ("version is missing",)),
        ("version: 1", "version: 2", ("line 1", "Write 1.")),
        ("version: 1", "- 1", ("this is not YAML",)),
        ("looks: 1", "looks: 1\nlooks: 2", ("line 7", "given twice")),
        ("looks: 1", "x: &a [1]\nlooks: *a", ("line 7", "alias")),
    ],
)
def test_mistakes_are_told_with_their_line(gate, old, new, parts):
    assert old in GATE
    gate.write_text(GATE.replace(old, new))
    refused(sentei("gate", gate, "--prometheus", "http://127.0.0.1:1"), str(gate), *parts)


def test_the_guide_shows_the_defaults(gate):
    guide = (ROOT / "docs/guides/deploy.md").read_text(encoding="utf-8")
    defaults, shadow = (part.split("```")[0] for part in guide.split("```yaml\n")[1:])
    gate.write_text(defaults, encoding="utf-8")
    found = read_yaml_document(gate, GateDocument, hint="")
    assert found == GateDocument(version=1, original=found.original, candidate=found.candidate)
    assert set(GateDocument.model_fields) - {"shadow"} == found.model_fields_set  # which has no default
    gate.write_text(gate.read_text(encoding="utf-8") + shadow, encoding="utf-8")
    assert read_yaml_document(gate, GateDocument, hint="").shadow is not None


def test_no_prometheus(gate):
    refused(sentei("gate", gate, "--prometheus", "http://127.0.0.1:1"), "cannot be asked at http://127.0.0.1:1")
