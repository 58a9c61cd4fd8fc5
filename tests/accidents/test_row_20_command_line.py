"""Odd numbers, odd metrics and odd terminals: a sentence, exit code 2, and nothing left."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import PLAIN, refused, sentei
from toolchain.text.windows import _within

NOT_FINITE = [
    "prune {model} -o {out} --sparsity",
    "prune {model} -o {out} --sparsity 0.25 --max-metric",
    "prune {model} -o {out} --sparsity 0.25 --min-metric",
    "prune {model} -o {out} --sparsity 0.25 --max-degradation",
    "heal {model} --against {model} --data {text} -o {out} --learning-rate",
    "generate {model} --prompt hi --temperature",
    "generate {model} --prompt hi --top-p",
    "export vllm {model} -o {out} --max-shard-gb",
    "benchmark {model} {model} --engine transformers -o {out} --price-per-hour",
    "benchmark {model} {model} --engine transformers -o {out} --range-ratio",
    "benchmark {model} {model} --engine transformers -o {out} --stall-timeout",
    "calibration-text {model} -o {out}.jsonl --temperature",
]
SEEDED = [
    "prune {model} -o {out} --sparsity 0.25 --seed",
    "heal {model} --against {model} --data {text} -o {out} --seed",
    "compare-methods {model} -o {out} --text {text} --seed",
    "calibration-text {model} -o {out}.jsonl --seed",
    "generate {model} --prompt hi --seed",
]


def run(line: str, value: object, model: Path, text: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return sentei(*(word.format(model=model, text=text, out=out / "out") for word in line.split()), value)


@pytest.mark.parametrize("line", NOT_FINITE)
def test_numbers_that_are_not_finite(pico_model: Path, text: Path, tmp_path: Path, line: str):
    for value in ("nan", "inf", "-inf", "1e400"):
        refused(run(line, value, pico_model, text, tmp_path), line.split()[-1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", SEEDED)
def test_seeds(pico_model: Path, text: Path, tmp_path: Path, line: str):
    for value in (2**70, 2**32, -1):
        refused(run(line, value, pico_model, text, tmp_path), "--seed")
    assert not list(tmp_path.iterdir())


def test_no_limit_of_these_would_come_to_an_end(pico_model: Path, text: Path, tmp_path: Path):
    started = time.monotonic()
    assert _within([1.0], [10], 10**12) == [10]
    assert time.monotonic() - started < 1
    batch = ["--concurrency", 10**9, "--input-len", 8, "--output-len", 4]
    asked = ["benchmark", pico_model, pico_model, "--engine", "transformers", "-o", tmp_path / "out"]
    refused(sentei(*asked, *batch), "more than 1000000")


def test_the_working_directory_as_output(pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    refused(sentei("export", "vllm", pico_model, "-o", "."), "is a working directory")


OWN = """
import sys
from pathlib import Path


def leaves(model, tokenizer):
    sys.exit("bye")


def says(model, tokenizer):
    print("noise from a metric")
    return sum(float(each.float().abs().mean()) for each in model.parameters())


def endless(model, tokenizer):
    return endless(model, tokenizer)


def text(model, tokenizer):
    return "1.5" * 10**6


def big(model, tokenizer):
    return 10**400


def several(model, tokenizer):
    return next(model.parameters())
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_odd_metric.py").write_text(OWN)
    (tmp_path / "leaves_at_import.py").write_text("print('noise from an import')\nraise SystemExit(3)\n")
    (tmp_path / "breaks_at_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def prune_by(metric: str, model: Path, text: Path, out: Path) -> subprocess.CompletedProcess[str]:
    small = ["--sparsity", 0.25, "--calibration", text, "--samples", 1, "--seq-len", 32, "--align", 1]
    small += ["--attention-removals", 1, "--json", "--quiet"]
    return sentei("prune", model, "-o", out, *small, *PLAIN, "--metric", metric)


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (":f", "is not known"),
        (".:f", "names no function"),
        ("..x:f", "names no function"),
        ("a.b:", "is not known"),
        ("leaves_at_import:f", "raised SystemExit: 3"),
        ("breaks_at_import:f", "raised ZeroDivisionError"),
        ("own_odd_metric:leaves", "raised SystemExit: bye (own_odd_metric.py line 7)"),
        ("own_odd_metric:endless", "raised RecursionError"),
        ("own_odd_metric:text", "a value of type str, which is not a number"),
        ("own_odd_metric:big", "a value of type int, which is not a number"),
        ("own_odd_metric:several", "a value of type Parameter, which is not a number"),
    ],
)
def test_metrics(pico_model: Path, text: Path, own_module: Path, tmp_path: Path, metric: str, sentence: str):
    done = prune_by(metric, pico_model, text, tmp_path / "out")
    refused(done, sentence)
    assert len(done.stderr) < 1000
    assert not (tmp_path / "out").exists()


def test_what_a_metric_prints_is_not_in_the_result(pico_model: Path, text: Path, own_module: Path, tmp_path: Path):
    done = prune_by("own_odd_metric:says", pico_model, text, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["directory"] == str(tmp_path / "out")
    assert "noise from a metric" in done.stderr


SHOWS = """
import sys
from toolchain.cli.terminal import prepare_streams
prepare_streams()
from toolchain.cli.console import Output
text = "→ 剪定🌳é"
Output(as_json="--json" in sys.argv, quiet=True).result({"text": text}, lambda console: console.print(text))
"""


def test_a_terminal_without_unicode():
    """What such a terminal cannot show is escaped, and JSON stays JSON."""
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown, told = (
        subprocess.run(
            [sys.executable, "-c", SHOWS, *more], env=ascii_only, capture_output=True, timeout=100, check=True
        )
        for more in ([], ["--json"])
    )
    assert shown.stdout.decode("ascii").startswith("\\u2192 ")
    assert json.loads(told.stdout.decode("ascii")) == {"text": "→ 剪定🌳é"}


def test_a_closed_stdout(tmp_path: Path):
    """The number of a closed stream must not become that of a file, into which a library would print."""
    program = (
        "import os, sys; os.close(1); sys.stdout = None; from toolchain.cli.terminal import prepare_streams; "
        f"prepare_streams(); file = open({str(tmp_path / 'weights')!r}, 'wb'); print('lost'); "
        "sys.exit(0 if file.fileno() > 2 else 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_json_on_a_stream_of_a_test(monkeypatch: pytest.MonkeyPatch):
    from toolchain.cli.terminal import takes_unicode

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert not takes_unicode()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert takes_unicode()
