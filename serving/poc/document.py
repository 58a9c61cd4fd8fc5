"""``poc.yaml``: the model, the texts, the load, the guard rails and the candidates of a proof of concept."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from serving.decision.document import CapacityInputs, GuardRails, Positive
from toolchain.documents import Document, Number, Record

POC_FILE = "poc.yaml"
Engine = Literal["onnx", "vllm"]
Precision = Literal["int8", "int4", "fp8"]
# What each engine's exports can be rounded to; see sentei export onnx and sentei quantize.
PRECISIONS: dict[str, tuple[str, ...]] = {"onnx": ("int8", "int4"), "vllm": ("int8", "fp8", "int4")}
_MOST_SPARSITIES = 16
_LEAST_REPEATS = 3
# What the template leaves to be filled in.
PLACEHOLDER = "CHANGE_ME"


def _filled_in(text: str) -> str:
    if PLACEHOLDER in text:
        raise ValueError(f"{PLACEHOLDER} is still there: write your own")
    if not text.strip() or any(ord(each) < 32 for each in text):
        raise ValueError("this is empty, or has characters that no name has")
    if text.startswith("-"):
        raise ValueError("a name must not begin with a dash: write ./ before it")
    return text


def _a_sparsity(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"a sparsity lies between 0 and 1: for 25 % write 0.25, not {value:g}")
    return value


def _distinct(values: list[Any]) -> list[Any]:
    if repeated := [each for number, each in enumerate(values) if each in values[:number]]:
        raise ValueError(f"{repeated[0]} stands here twice")
    return values


def _named_apart(sparsities: list[float]) -> list[float]:
    """Directories and candidates are named by six digits of them."""
    _distinct([f"{each:g}" for each in sparsities])
    return sparsities


Name = Annotated[str, AfterValidator(_filled_in)]
Names = Annotated[list[Name], AfterValidator(_distinct)]
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]
Sparsity = Annotated[Number, AfterValidator(_a_sparsity)]
Precisions = Annotated[list[Precision], AfterValidator(_distinct)]


class CalibrationSettings(Record):
    """Text that pruning is decided with, as for ``sentei prune``."""

    text: Annotated[Names, Field(min_length=1)]
    samples: Annotated[int, Field(ge=2, le=100_000)] = 32
    seq_len: Tokens | None = None


class EvaluationSettings(Record):
    """What quality is measured on, as for ``sentei evaluate``. ``tasks`` are lm-eval's, written ``NAME=FILE``."""

    text: Annotated[Names, Field(min_length=1)]
    windows: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    seq_len: Tokens | None = None
    questions: Names = Field(default_factory=list)
    chat_template: bool = False
    tasks: Names = Field(default_factory=list)


class Limits(Record):
    """What a request may take at most, in ms, for the share ``attainment`` of the requests."""

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2el_ms: Positive | None = None
    attainment: Annotated[Number, Field(ge=0.5, le=0.995)] = 0.9

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if not self.asked:
            raise ValueError("no limit is given: write ttft_ms, tpot_ms or e2el_ms, or leave limits out")
        return self

    @property
    def asked(self) -> str:
        """As ``sentei benchmark --slo`` takes it."""
        values = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2el": self.e2el_ms}
        return ",".join(f"{name}={value:g}" for name, value in values.items() if value is not None)


class WorkloadSettings(Record):
    """The load under which speed is measured. With ``limits`` the highest request rate within them is searched for."""

    input_len: Tokens
    output_len: Tokens
    concurrency: Annotated[int, Field(ge=1, le=100_000)] = 1
    repeats: Annotated[int, Field(ge=_LEAST_REPEATS, le=100)] = 5
    limits: Limits | None = None


class CandidateSettings(Record):
    """How far to prune: the smallest sparsity first, further while the guard rails of quality hold.

    ``bisect`` more sparsities are tried between the last that holds and the first that does not.
    """

    sparsities: Annotated[
        list[Sparsity], Field(min_length=1, max_length=_MOST_SPARSITIES), AfterValidator(_named_apart)
    ] = Field(default_factory=lambda: [0.125, 0.25, 0.375, 0.5])
    bisect: Annotated[int, Field(ge=0, le=5)] = 0


class AlternativeSettings(Record):
    """What else is measured: the original rounded, the furthest pruned model rounded, and smaller models."""

    quantised: Precisions = Field(default_factory=list)
    pruned_and_quantised: Precisions = Field(default_factory=list)
    siblings: Names = Field(default_factory=list)


def _none_is_default(value: Any) -> Any:
    return {} if value is None else value


# A part whose keys are all commented out.
_Empty = BeforeValidator(_none_is_default)


class PocDocument(Document):
    """All of ``poc.yaml``. Paths are relative to it."""

    version: Literal[1]
    language: Literal["en", "ja"] = "en"
    model: Name
    calibration: CalibrationSettings
    evaluation: EvaluationSettings
    engine: Engine
    device: Literal["cpu", "cuda"] = "cpu"
    workload: WorkloadSettings
    guard_rails: GuardRails
    capacity: Annotated[CapacityInputs, _Empty] = Field(default_factory=CapacityInputs)
    candidates: Annotated[CandidateSettings, _Empty] = Field(default_factory=CandidateSettings)
    alternatives: Annotated[AlternativeSettings, _Empty] = Field(default_factory=AlternativeSettings)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        rails = self.guard_rails
        if (rails.least_accuracy is not None or rails.groups) and not self.evaluation.questions:
            raise ValueError("guard_rails ask for accuracy, and evaluation names no file of questions")
        allowed = PRECISIONS[self.engine]
        asked = [*self.alternatives.quantised, *self.alternatives.pruned_and_quantised]
        if unknown := [each for each in asked if each not in allowed]:
            raise ValueError(f"alternatives: engine {self.engine} has no {unknown[0]}: write {' or '.join(allowed)}")
        return self
