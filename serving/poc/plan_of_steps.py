"""Which commands make a proof of concept: one step each, with what it writes.

Every step is a command of sentei in a process of its own, as a person would type it. So all memory is free again when
it ends, a step that dies takes no other with it, and each can be repeated by hand. What several candidates need is a
step of its own: the plans of all sparsities, which share model and statistics; the original's evaluation, whose parts
the candidates' evaluations take over; and its export. Speed alone is measured anew with each candidate, original and
candidate in turn: a gain over what the original did an hour ago would have no interval worth printing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.poc.document import PocDocument

SENTEI = (
    "-c",
    "from toolchain.lifetime import end_with_parent; end_with_parent(); from toolchain.cli.entry import main; main()",
)
ENGINE_QUALITY = ("-m", "serving.poc.engine_quality")
ORIGINAL = "original"
# What both models write is shown, not judged, and takes long.
_GENERATIONS = 4
_SWEEP = "--sweep"
_SCHEMES = {"int8": "int8", "fp8": "fp8", "int4": "w4a16"}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command.

    Attributes:
        name: For people, and unique.
        work: What kind of work it is, by which its time is estimated.
        program: Words for Python, before the arguments.
        arguments: Of the command.
        out: What it writes.
        needs: Steps whose output it reads.
        resumes: Whether it knows ``--resume``.
        seeded_from: A directory of finished parts that it may take over.
        scale: How much of the work there is, relative to once through the original.
    """

    name: str
    work: str
    program: tuple[str, ...] = SENTEI
    arguments: tuple[str, ...]
    out: Path
    needs: tuple["Step", ...] = ()
    resumes: bool = False
    seeded_from: Path | None = None
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of one proof of concept.

    Attributes:
        poc: What was asked for.
        model: The original's directory.
        directory: Where everything goes.
        swept: The sparsities whose plans are searched for together; the others are searched for one by one.
    """

    poc: PocDocument
    model: Path
    directory: Path
    swept: Sequence[float]

    @property
    def sweep(self) -> Step:
        """The plans of several sparsities, of which none is a model yet."""
        listed = sorted(self.swept)
        # A list of one is written with a comma too.
        asked = ",".join(f"{each:g}" for each in listed) if len(listed) > 1 else f"{listed[0]:g}:{listed[0]:g}:1"
        out = self.directory / "plans"
        arguments = ("prune", str(self.model), "-o", str(out), _SWEEP, asked, *self._calibration)
        return Step(name="plans", work="plans", arguments=arguments, out=out, resumes=True, scale=len(listed))

    def pruned(self, sparsity: float) -> Step:
        """A pruned model: from its plan, or searched for where there is none."""
        out = self.directory / "models" / f"{sparsity:g}"
        name = f"prune {percent(sparsity)}"
        if f"{sparsity:g}" in {f"{each:g}" for each in self.swept}:
            plan = self.sweep.out / f"{sparsity:g}"
            texts = [word for text in self.poc.calibration.text for word in ("--calibration", text)]
            arguments = ("apply", str(plan), str(self.model), "-o", str(out), *texts)
            return Step(name=name, work="apply", arguments=arguments, out=out, needs=(self.sweep,))
        arguments = ("prune", str(self.model), "-o", str(out), "--sparsity", f"{sparsity:g}", *self._calibration)
        return Step(name=name, work="prune", arguments=arguments, out=out, resumes=True)

    @property
    def _calibration(self) -> tuple[str, ...]:
        settings = self.poc.calibration
        words = [word for text in settings.text for word in ("--calibration", text)]
        words += ["--samples", str(settings.samples)]
        words += [] if settings.seq_len is None else ["--seq-len", str(settings.seq_len)]
        return tuple(words)

    @property
    def evaluated_original(self) -> Step:
        """The original's answers."""
        out = self.directory / "evaluations" / ORIGINAL
        arguments = ("evaluate", str(self.model), "-o", str(out), *self._evaluation)
        return Step(name="evaluate original", work="evaluate", arguments=arguments, out=out, resumes=True)

    def evaluated(self, name: str, model: Path, made_by: Step | None) -> Step:
        """A candidate's answers, beside the original's."""
        original = self.evaluated_original
        out = self.directory / "evaluations" / file_name(name)
        arguments = (
            "evaluate", str(model), "--against", str(self.model), "-o", str(out), *self._evaluation,
            "--generations", str(_GENERATIONS),
        )  # fmt: skip
        return Step(
            name=f"evaluate {name}", work="evaluate", arguments=arguments, out=out,
            needs=(original, *([made_by] if made_by else [])), resumes=True, seeded_from=original.out / "parts",
        )  # fmt: skip

    @property
    def _evaluation(self) -> tuple[str, ...]:
        settings = self.poc.evaluation
        words = [word for text in settings.text for word in ("--text", text)]
        words += [word for file in settings.questions for word in ("--questions", file)]
        words += [word for task in settings.tasks for word in ("--task", task)]
        words += [word for asked in self.poc.guard_rails.metrics for word in ("--metric", asked)]
        words += [] if settings.windows is None else ["--windows", str(settings.windows)]
        words += [] if settings.seq_len is None else ["--seq-len", str(settings.seq_len)]
        words += ["--chat-template"] if settings.chat_template else []
        return tuple(words)

    def exported(self, name: str, model: Path, made_by: Step | None, precision: str | None = None) -> Sequence[Step]:
        """The export of a model for the engine, and its verification where that is a step of its own."""
        out = self.directory / "exports" / file_name(name)
        needs = (made_by,) if made_by else ()
        if self.poc.engine == "onnx":
            words = ["export", "onnx", str(model), "-o", str(out), "--device", self.poc.device]
            words += ["--precision", precision] if precision else []
            return [Step(name=f"export {name}", work="export", arguments=tuple(words), out=out, needs=needs)]
        if precision:
            words = ["quantize", str(model), "--scheme", _SCHEMES[precision], "-o", str(out)]
            words += self._calibration if precision == "int4" else ()
        else:
            words = ["export", "vllm", str(model), "-o", str(out)]
        export = Step(name=f"export {name}", work="export", arguments=tuple(words), out=out, needs=needs)
        # What export vllm has compared, it has compared in Transformers.
        verify = ("verify", str(out), "--against", str(model), "--engine", "vllm")
        verification = out / "verification.json"
        return [export, Step(name=f"verify {name}", work="verify", arguments=verify, out=verification, needs=(export,))]

    def asked_in_engine(self, name: str, export: Step) -> Step:
        """The answers of a rounded model, which Transformers cannot compute, in the engine that serves it."""
        out = self.directory / "evaluations" / file_name(name)
        original, asked = self.evaluated_original, self.poc.evaluation
        job = {
            "engine": self.poc.engine, "model": str(self.model), "export": str(export.out),
            "original": str(original.out), "out": str(out), "texts": asked.text, "questions": asked.questions,
            "metrics": list(self.poc.guard_rails.metrics), "chat_template": asked.chat_template,
        }  # fmt: skip
        arguments = (json.dumps(job),)
        return Step(
            name=f"evaluate {name}", work="evaluate", program=ENGINE_QUALITY, arguments=arguments, out=out,
            needs=(original, export),
        )  # fmt: skip

    def measured(self, name: str, original: Step | None, export: Step, precision: str | None = None) -> Step:
        """Original and candidate in turn; ``precision`` is the candidate's, if it was rounded."""
        load = self.poc.workload
        engine = self.poc.engine if self.poc.engine == "vllm" or not load.limits else "onnx-server"
        out = self.directory / "benchmarks" / file_name(name)
        first = self.model if original is None else original.out
        words = ["benchmark", str(first), str(export.out), "--engine", engine, "-o", str(out)]
        words += ["--input-len", str(load.input_len), "--output-len", str(load.output_len)]
        words += ["--concurrency", str(load.concurrency), "--repeats", str(load.repeats)]
        if load.limits:
            words += ["--slo", load.limits.asked, "--attainment", f"{load.limits.attainment:g}"]
        words += ["--mixed-precision"] if precision else []
        needs = (export,) if original is None else (original, export)
        return Step(
            name=f"benchmark {name}", work="benchmark", arguments=tuple(words), out=out, needs=needs, resumes=True
        )  # fmt: skip


def swept_by(command: Sequence[str]) -> list[float]:
    """The sparsities of a sweep's command."""
    asked = command[command.index(_SWEEP) + 1]
    return [float(each) for each in asked.partition(":")[0].split(",")]


def percent(sparsity: float) -> str:
    """A sparsity as people say it."""
    return f"{100 * sparsity:g} %"


def file_name(name: str) -> str:
    """A candidate's name as part of a path."""
    kept = "".join(
        each if each.isalnum() or each in "._" else "-" for each in name.replace(" %", "").replace(" + ", "+")
    )
    return kept.strip("-.") or "model"
