"""An empty directory in which a document's commands are run as they stand, on a model of thirty narrow layers.

What a reader would have before they type the first command (a model, texts, questions, a key) is made when a command
names it; so is what an earlier guide would have left, such as ``pruned``.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from serving.onnx_export.files import is_onnx_export
from serving.server.process import free_port, is_healthy
from tests.accidents.processes import wait_for
from tests.command_line import PROGRAM, sentei
from tests.docs.commands import ROOT, Command
from tests.serving.signing.conftest import make_pair

WRITTEN = ROOT / "tests" / "fixtures" / "written"
# Added to what is shown; the last one of an option counts.
SMALLER = {
    "prune": "--samples 4 --seq-len 16 --align 8",
    "evaluate": "--windows 2 --seq-len 16 --limit 2",
    "compare-methods": "--sparsity 0.3 --methods 2ssp,shortgpt --samples 2 --windows 2 --seq-len 16 --align 8",
    "heal": "--steps 20 --batch-size 2 --seq-len 32",
    "calibration-text": "--tokens 400 --max-new-tokens 32",
    "generate": "--max-new-tokens 2",
    "benchmark": "--repeats 3 --input-len 16 --output-len 4 --num-prompts 2",
}
FOR_VLLM = ("--enforce-eager", "--max-model-len=128", "--kv-cache-memory-bytes=1G")
# A model of random weights meets no limit of quality.
EASIER = {"--max-degradation": "100", "--min-metric": "0"}
# What an earlier guide leaves, and how.
EARLIER = {
    "pruned": "prune MODEL -o pruned --sparsity 0.25 --calibration text.jsonl",
    "other": "prune MODEL -o other --sparsity 0.3 --calibration text.jsonl",
    "PLAN": "prune MODEL -o PLAN --sparsity 0.25 --calibration text.jsonl",
    "curves": "prune MODEL -o curves --sweep 0.1:0.3:0.1 --calibration text.jsonl",
    "original": "export onnx MODEL -o original",
    "original-onnx": "export onnx MODEL -o original-onnx",
    "deploy": "export onnx pruned -o deploy",
    "deploy-onnx": "export onnx pruned -o deploy-onnx",
}
MEASURED = {
    **dict.fromkeys(("benchmark", "chat", "slo", "monday", "friday", "onnx"), "benchmark-onnx"),
    "evaluation": "evaluation",
}
ARC = [
    {"question": f"What do {each} need?", "choices": {"text": ["rain", "ink"], "label": ["A", "B"]}, "answerKey": "A"}
    for each in ("trees", "pens", "ducks", "herbs")
] * 10
MMLU = [
    {"question": "What do trees need?", "subject": "trees", "choices": ["rain", "ink", "oil", "sand"], "answer": 0}
] * 4
QUESTIONS = [
    {"prompt": f"{each} is", "choices": ["a thing", "nothing"], "answer": 0, "subject": "safety"}
    for each in ("Air", "Tea", "Ice", "Fog")
]
CLAIMS = [{"prompt": f"{each} burnt.", "choices": ["fraud", "fine"], "answer": 0} for each in ("Tea", "Ice")]
PIQA = [{"goal": f"To fill {each}", "sol1": "pour in water.", "sol2": "add a hole.", "label": 0} for each in "abcd"]
SERVER_STARTS_S = 240


@dataclass(frozen=True)
class Workplace:
    """``directory`` is the working directory; ``model`` is what ``MODEL`` stands for."""

    directory: Path
    model: Path

    def run(self, words: Sequence[str]) -> None:
        """Runs one command, in a smaller size, and says all of it where it fails."""
        self._make_what_is_missing(words)
        if (out := _out(words)) and "--resume" not in words:
            shutil.rmtree(self.directory / out, ignore_errors=True)
            (self.directory / out).unlink(missing_ok=True)
        if words[0] == "serve":
            self._serve(words)
            return
        done = sentei(*words, *_smaller(words))
        assert done.returncode == 0, f"sentei {shlex.join(words)}\n{done.stdout}\n{done.stderr}"

    def _make_what_is_missing(self, words: Sequence[str]) -> None:
        for before, word in pairwise(words):
            if before in ("-o", "--out"):
                continue
            # What follows # in a metric is no part of its file.
            name = re.split(r"[:=]", word.partition("#")[0])[-1]
            top, path = name.partition("/")[0], self.directory / name
            if not name or path.exists():
                continue
            if top == "MODEL":
                (self.directory / top).symlink_to(self.model)
            elif top in EARLIER:
                self.run(EARLIER[top].split())
            elif top in MEASURED:
                shutil.copytree(WRITTEN / MEASURED[top], self.directory / top)
            elif name.endswith("/"):
                path.mkdir()
                (path / "text.txt").write_text(_prose(name))
            elif path.suffix in (".jsonl", ".txt"):
                path.write_text(_content(before, word, name))
            elif path.suffix in (".pem", ".pub"):
                make_pair(self.directory, path.stem)

    def _serve(self, words: Sequence[str]) -> None:
        """Starts the server, and ends it once it is up."""
        port = free_port()
        more = [*([] if "--" in words else ["--"]), "--port", str(port)]
        if not is_onnx_export(self.directory / words[1]):
            more += ["--enforce-eager", "--kv-cache-memory-bytes", "1G"]
        with (self.directory / "server.log").open("w") as log:
            command = [PROGRAM, *words, *more]
            server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(lambda: server.poll() is not None or is_healthy(f"http://127.0.0.1:{port}"), SERVER_STARTS_S)
            assert server.poll() is None, (self.directory / "server.log").read_text()
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=120) in (0, 130)
        finally:
            server.kill()


def _out(words: Sequence[str]) -> str | None:
    return next((word for before, word in pairwise(words) if before in ("-o", "--out")), None)


def _smaller(words: Sequence[str]) -> list[str]:
    added = SMALLER.get(words[0], "").split()
    if words[0] == "benchmark" and "vllm" in words:
        added += [f"--engine-option={each}" for each in FOR_VLLM]
    if words[0] == "evaluate" and {"--text", "--against"} <= set(words):
        added += ["--generations", "1"]
    return [*added, *(part for option, value in EASIER.items() if option in words for part in (option, value))]


def _content(option: str, word: str, name: str) -> str:
    """A file that the option can read."""
    if option in ("--task", "--fewshot"):
        rows = {"piqa": PIQA, "mmlu": MMLU, "arc_challenge": ARC}.get(word.partition("=")[0], QUESTIONS)
        if option == "--fewshot":  # examples must not be among the questions
            asked = "question" if "question" in rows[0] else "prompt"
            rows = [{**row, asked: f"{name} asks: {row[asked]}"} for row in rows]
    elif option == "--questions" or word.startswith(("accuracy:", "refusal_rate:", "valid_json:")):
        rows = QUESTIONS
    elif word.startswith("f1:"):
        rows = CLAIMS
    elif option == "--prompts":
        rows = [{"prompt": "What do trees need in winter?", "output_tokens": 4}] * 4
    elif name.endswith(".txt"):
        return _prose(name)
    else:
        rows = [{"text": _prose(name)}]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _prose(name: str) -> str:
    return f"As {name} says, the gardener prunes the trees in winter, and in summer they bear more fruit. " * 40


def is_run(command: Command) -> bool:
    """Whether the journey runs it: what :data:`NOT_RUN` names is tested elsewhere, or cannot be run here."""
    return why_not(command) is None


# Where all of these begin a word of the command, it is not run.
NOT_RUN: dict[tuple[str, ...], str] = {
    ("demo",): "make demo runs it, for six minutes",
    ("gate",): "needs a Prometheus that scrapes both sides: tests/serving/gate/test_real_prometheus.py has one",
    ("poc", "run"): "poc.yaml has to be filled in by a person: tests/serving/poc/test_poc.py runs one",
    ("quantize",): "needs llm-compressor in an environment of its own: tests/export/test_quantize.py",
    ("export", "int4"): "a random model's rounded answers are too close to each other: tests/export/test_onnx.py",
    ("profile",): "takes seven models: tests/serving/profile/test_real_engines.py",
    ("prune", "--costs"): "needs the costs of a profile: tests/toolchain/prune/test_aim.py",
    ("hub:",): "needs the network",
    ("pkcs11:",): "needs a token: tests/serving/signing/test_token.py",
    ("benchmark", "--url"): "needs servers that run: tests/serving/benchmark/test_benchmark_truth.py",
    ("benchmark", "--slo"): "searches for minutes: tests/serving/benchmark/test_goodput.py",
    ("benchmark", "vllm-offline"): "tests/serving/benchmark/sessions/test_offline.py",
}


def why_not(command: Command) -> str | None:
    """Why a command is not run; ``None`` if it is."""
    words = command.words
    if command.launcher:
        return "started by a launcher: tests/toolchain/heal/test_several_ranks.py"
    if any(before == "--task" and "=" not in word for before, word in pairwise(words)):
        return "downloads a task"
    if words[:1] and words[-1] in ("--help", "--version"):
        return "says only what exists, which test_commands.py checks"
    for parts, reason in NOT_RUN.items():
        if all(any(word.startswith(part) for word in words) for part in parts):
            return reason
    if command.file != "README.md" and words[0] == "benchmark" and "vllm" in words:
        return "README's own benchmark starts vLLM"
    return None
