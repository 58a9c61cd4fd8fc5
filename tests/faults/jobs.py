"""The long commands, on small models that keep each busy for a few seconds, and what an undisturbed run writes."""

import hashlib
import json
import os
import random
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.command_line import sentei
from tests.conftest import make_pico

_VOCABULARY = 4096
# Does what llm-compressor does, with the tests' own arithmetic, in a process of its own as that does; slowly.
_STAND_IN = """#!{python}
import json, sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from tests.quantized import write_quantized
job_file = Path(sys.argv[4])
job = json.loads(job_file.read_text())
print("rounding", flush=True)
time.sleep(2)
try:
    write_quantized(Path(job["source"]), Path(job["out"]), job["scheme"])
    time.sleep(1)
    job_file.with_suffix(".done").write_text(json.dumps({{"llmcompressor": "none"}}))
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


def make_inputs(directory: Path) -> None:
    """Makes everything that the commands read: models, their exports, text and questions."""
    make_pico(
        directory / "model", hidden_size=128, intermediate_size=384, num_hidden_layers=6, vocab_size=_VOCABULARY,
        max_position_embeddings=512,
    )  # fmt: skip
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(_VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(directory / "model")
    draw = random.Random(0)
    for name, number in (("text.txt", 40_000), ("other.txt", 20_000)):
        (directory / name).write_text(" ".join(f"w{draw.randrange(3, _VOCABULARY)}" for _ in range(number)))
    _must("prune", directory / "model", "-o", directory / "pruned", *_pruning(directory, samples=4))
    for name in ("model", "pruned"):
        _must("export", "onnx", directory / name, "-o", directory / f"{name}-onnx")
    stand_in = directory / "llm-compressor"
    stand_in.write_text(_STAND_IN.format(python=sys.executable, path=[str(Path(__file__).parents[2])]))
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)


def _must(*words: object) -> None:
    done = sentei(*words, "--quiet")
    assert done.returncode == 0, done.stderr


def _pruning(directory: Path, *, samples: int) -> tuple[object, ...]:
    return (
        "--sparsity", 0.3, "--align", 8, "--attention-removals", 2, "--calibration", directory / "text.txt",
        "--samples", samples, "--seq-len", 128,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command.

    Attributes:
        words: Arguments; ``IN/`` is the directory of the inputs, ``OUT`` the output.
        stages: What it does one after another, and the sign that it has begun: a text on stderr, or, from a dot on,
            the name of a path beside the output.
        reads: Inputs that are taken away while it runs.
        essence: What must be the same after an undisturbed run and after a mended one.
        environment: Variables to set.
    """

    words: str
    stages: Mapping[str, str]
    reads: tuple[str, ...] = ("model",)
    essence: Callable[[Path], Any] = field(default_factory=lambda: essence_of)
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, inputs: Path, out: Path, *more: object) -> list[str]:
        """The arguments, with places put in."""
        words = [str(word).replace("IN/", f"{inputs}/") for word in (*self.words.split(), *more)]
        return [str(out) if word == "OUT" else word for word in words]


# Numbers that no two runs have in common.
_TIMES = {"duration_s", "pruning_s"}
_WITH_TIMES = {"comparison.md"}  # a view of the JSON beside it


def essence_of(out: Path) -> dict[str, Any]:
    """Every file below a directory: JSON without times, everything else as a hash of its bytes."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in _WITH_TIMES:
            name = str(path.relative_to(out))
            whole = path.read_bytes()
            found[name] = _timeless(json.loads(whole)) if path.suffix == ".json" else hashlib.sha256(whole).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in _TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def _measurements(out: Path) -> dict[str, Any]:
    """Of a benchmark, which measures another speed each time: how much was measured, and by what."""
    results = json.loads((out / "results.json").read_text())
    [measurement] = results["measurements"]
    counts = {name: len(metric["original"]["values"]) for name, metric in measurement["metrics"].items()}
    return {"engine": results["engine"], "workload": measurement["workload"], "counts": counts}


def tree(directory: Path) -> dict[str, str]:
    """Every file's bytes, hashed."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


_CALIBRATION = "--calibration IN/text.txt --samples 64 --seq-len 128"
_BENCHMARK = "--input-len 16 --output-len 8 --repeats 3 -o OUT"
_EXPORT_STAGES = {"writing": ".partial", "verifying": "Verifying"}

JOBS: Mapping[str, Job] = {
    "prune": Job(
        words=f"prune IN/model -o OUT --sparsity 0.3 --align 8 --attention-removals 2 {_CALIBRATION}",
        stages={
            "gradients": "Sensitivity of neurons",
            "search": ".search/plan.json",
            "compensation": "Compensation",
            "writing": "Writing the checkpoint",
        },
    ),
    "prune --sweep": Job(
        words=f"prune IN/model -o OUT --sweep 0.2:0.4:0.1 --align 8 {_CALIBRATION}",
        stages={"search": "Search for attentions"},
    ),
    "prune --heal-steps": Job(
        words="prune IN/model -o OUT --sparsity 0.3 --align 8 --attention-removals 2 --heal-steps 40 --dtype float32 "
        f"{_CALIBRATION}",
        stages={"compensation": "Compensation", "training": "Healing"},
    ),
    "apply": Job(
        words="apply IN/pruned IN/model -o OUT --calibration IN/text.txt", stages={"compensation": "Compensation"}
    ),
    "compare-methods": Job(
        words="compare-methods IN/model -o OUT --sparsity 0.2,0.3 --methods 2ssp,shortgpt --align 8 "
        f"--text IN/other.txt --windows 50 {_CALIBRATION}",
        stages={"first method": "Importance of neurons", "second method": "Block influence"},
    ),
    "evaluate": Job(
        words="evaluate IN/pruned --against IN/model --text IN/text.txt --text IN/other.txt --seq-len 64 "
        "--windows 200 --generations 2 -o OUT",
        stages={"first text": "text.txt", "second text": ".parts"},
        reads=("pruned", "model"),
    ),
    "heal": Job(
        words="heal IN/pruned --against IN/model --data IN/text.txt --steps 20 --batch-size 4 --seq-len 64 "
        "--dtype float32 -o OUT",
        stages={"training": "Healing", "writing": "Writing the checkpoint"},
        reads=("pruned", "model"),
    ),
    "export vllm": Job(words="export vllm IN/pruned -o OUT", stages=_EXPORT_STAGES, reads=("pruned",)),
    "export onnx": Job(words="export onnx IN/pruned -o OUT", stages=_EXPORT_STAGES, reads=("pruned",)),
    "quantize": Job(
        words="quantize IN/pruned --scheme int8 -o OUT",
        stages={"rounding": "rounding", "writing": ".partial/model.safetensors"},
        reads=("pruned",),
        environment={"SENTEI_QUANTIZE_PYTHON": "IN/llm-compressor"},
    ),
    "benchmark --engine transformers": Job(
        words=f"benchmark IN/model IN/pruned --engine transformers {_BENCHMARK}",
        stages={"first model": ".unfinished/settings.json", "later": ".unfinished/measured.jsonl"},
        reads=("model", "pruned"),
        essence=_measurements,
    ),
    "benchmark --engine onnx": Job(
        words=f"benchmark IN/model-onnx IN/pruned-onnx --engine onnx {_BENCHMARK}",
        stages={"later": ".unfinished/measured.jsonl"},
        reads=("model-onnx", "pruned-onnx"),
        essence=_measurements,
    ),
}


def older_output(out: Path) -> None:
    """Something that ``--force`` would replace."""
    out.mkdir()
    (out / "kept.txt").write_text(f"by {os.getpid()}")
