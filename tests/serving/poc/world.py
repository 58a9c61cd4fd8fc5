"""Steps without engines: each writes what its command would, with numbers that a test has chosen."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.poc.document import PocDocument
from serving.poc.plan_of_steps import Step, Steps
from serving.poc.run_steps import Outcome

WRITTEN = Path(__file__).parents[2] / "fixtures" / "written"
TEXT, QUESTIONS = "held.txt", "own.jsonl"
POC: dict[str, Any] = {
    "version": 1, "model": "own",
    "calibration": {"text": ["calibration.txt"]}, "evaluation": {"text": [TEXT], "questions": [QUESTIONS]},
    "engine": "onnx", "workload": {"input_len": 32, "output_len": 16, "repeats": 4},
    "guard_rails": {"most_perplexity": 1.2, "least_gain": 1.1},
    "capacity": {"peak_requests_per_s": 100, "price_per_hour": 2},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A model as it is.

    Attributes:
        loss: Perplexity over the original's.
        gain: In speed, over the original's.
        right: Share of right answers, by subject.
        metrics: Of one's own questions, by label; each was measured to within 0.02.
        memory_bytes: At most.
        seen: Share of the text that was read in calibration.
    """

    loss: float = 1.05
    gain: float = 1.3
    right: Mapping[str, float] = field(default_factory=lambda: {"law": 0.8, "safety": 0.9})
    metrics: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 500_000_000
    seen: float = 0.0


ORIGINAL = Truth(loss=1, gain=1, memory_bytes=700_000_000)


@dataclass(kw_only=True)
class World:
    """Runs steps by writing their files.

    Attributes:
        truths: By candidate.
        failing: Names of steps that fail, and how.
        done: Names of the steps that were run, in order.
    """

    truths: Mapping[str, Truth]
    failing: Mapping[str, Outcome] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def __call__(self, step: Step) -> Outcome:
        if step.name in self.done:
            return Outcome()
        self.done.append(step.name)
        if step.name in self.failing:
            return self.failing[step.name]
        name = step.name.partition(" ")[2]
        truth = ORIGINAL if name == "original" else self.truths.get(name, Truth())
        if step.work == "evaluate" and step.program[0] == "-c":
            write_evaluation(step.out, name, truth)
        elif step.work == "evaluate":
            write_engine_quality(step.out, truth)
        elif step.work == "benchmark":
            write_results(step.out, truth)
        return Outcome()

    def record_of(self, step: Step) -> None:
        """Nothing was run before."""


def steps_of(directory: Path, **changed: Any) -> Steps:
    poc = PocDocument.model_validate(POC | changed)
    return Steps(poc=poc, model=Path("/models/own"), directory=directory, swept=poc.candidates.sparsities)


def answers(truth: Truth, each: int = 200) -> list[dict[str, Any]]:
    return [
        {"subject": subject, "scores": {"acc_norm": float(number < share * each)}}
        for subject, share in truth.right.items()
        for number in range(each)
    ]


def write_evaluation(out: Path, name: str, truth: Truth) -> None:
    document = json.loads((WRITTEN / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    side = "original" if name == "original" else "pruned"
    if name == "original":
        document["evaluations"] = document["evaluations"][:1]
        document["text_comparisons"] = []
    else:
        ratio = {"value": truth.loss, "low": truth.loss * 0.99, "high": truth.loss * 1.01}
        document["text_comparisons"][0]["perplexity_ratio"] |= ratio
        document["text_overlaps"][0]["share"] = truth.seen
    document["metrics"] = [
        {
            "model": side, "directory": name, "metric": label, "source": "q.jsonl", "questions_sha256": "0",
            "higher_is_better": True, "num_questions": 9, "num_counted": 9, "max_new_tokens": None, "bos": None,
            "chat_template": False, "duration_s": 1, "score": {"value": value, **ends(value)},
        }
        for label, value in truth.metrics.items()
    ]  # fmt: skip
    parts = out / "parts"
    parts.mkdir(parents=True)
    (out / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    part = {"identity": {"task": QUESTIONS}, "result": {"metric": "acc_norm", "questions": answers(truth)}}
    (parts / f"{side}-{QUESTIONS}-0123456789abcdef.json").write_text(json.dumps(part), encoding="utf-8")


def ends(value: float) -> dict[str, float]:
    return {"low": max(0, value - 0.02), "high": min(1, value + 0.02)}


def write_engine_quality(out: Path, truth: Truth) -> None:
    out.mkdir(parents=True)
    asked = [{"subject": each["subject"], "score": each["scores"]["acc_norm"]} for each in answers(truth)]
    ratio = {"value": truth.loss, "low": truth.loss * 0.99, "high": truth.loss * 1.01}
    content = {
        "schema_version": 1, "kind": "engine_quality", "perplexity": {TEXT: ratio}, "questions": {QUESTIONS: asked},
        "metrics": {label: {"value": value, **ends(value)} for label, value in truth.metrics.items()},
    }  # fmt: skip
    (out / "engine_quality.json").write_text(json.dumps(content), encoding="utf-8")


def write_results(out: Path, truth: Truth, seed: int = 0) -> None:
    """A benchmark with a little noise, compared as the product compares repeats."""
    from serving.benchmark.ratios import compare_repeats

    results = json.loads((WRITTEN / "benchmark-onnx" / "results.json").read_text(encoding="utf-8"))
    draw = random.Random(seed)
    runs = [
        {
            side: {name: value * gain * draw.lognormvariate(0, 0.01) for name, value in base.items()}
            for side, gain in (("original", 1.0), ("pruned", truth.gain))
        }
        for base in [{"output_throughput": 100.0, "request_throughput": 6.6}] * 4
    ]
    measurement = results["measurements"][0]
    found = compare_repeats(runs)
    measurement["metrics"] |= {name: found[name] for name in ("output_throughput", "request_throughput")}
    results["sizes"]["peak_memory_bytes"] |= {"original": ORIGINAL.memory_bytes, "pruned": truth.memory_bytes}
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
