"""``verification.json``: how an export compares with the checkpoint it was made from.

The exporters write it when they read back what they wrote, and ``sentei verify`` writes it anew once an engine has
answered. Neither imports the other, so it stands here.
"""

from typing import Annotated, Literal

from pydantic import Field, RootModel

from toolchain.documents import Document, Number, Record

VERIFICATION_FILE = "verification.json"


class CheckRecord(Record):
    """One check: ``limit`` is the largest ``value`` that passes; ``matrix`` is the one that is furthest off."""

    passed: bool
    value: Number
    limit: Number
    matrix: str | None = None


class ExportVerification(Document):
    """What an exporter found when it read back its tensors.

    ``scheme`` and what counts matrices and bytes are of quantised checkpoints, ``tensor_parallel`` of exports for
    vLLM, ``llama_cpp_obstacle`` of nemotron-nas exports. A field that does not apply is left out.
    """

    schema_version: Literal[1]
    sentei_version: str
    passed: bool
    engine: Literal["safetensors"]
    dtype: str | None = None
    scheme: str | None = None
    group_size: int | None = None
    tensor_parallel: int | None = None
    source_fingerprint: str
    num_tensors: int | None = None
    llama_cpp_obstacle: str | None = None
    num_matrices: int | None = None
    num_other_tensors: int | None = None
    source_weight_bytes: int | None = None
    weight_bytes: int | None = None
    tolerances: dict[str, float] | None = None
    max_difference: float | None = None
    checks: dict[str, CheckRecord]
    quantised_with: dict[str, str] | None = None


class ReferenceRecord(Record):
    """Where and how the checkpoint was computed; ``offloaded`` is in files of earlier versions only."""

    device: str
    dtype: str
    offloaded: bool | None = None


class NoiseRecord(Record):
    """How far the checkpoint's own answers move, in nats, where they are computed in ``dtype`` instead."""

    dtype: str
    max_difference: Number
    mean_difference: Number
    median_difference: Number
    greedy_margin: Number


class AnswersVerification(Document):
    """What ``sentei verify`` found; :class:`serving.verify.answers.Differences` says what each difference is.

    Differences are left out where no answer could be had, ``rounding_*`` where nothing was rounded. ``not_run`` says
    what could not be run, and is empty where all could. A tolerance is a margin times the noise, and a little more;
    ``reference``, ``noise`` and ``margins`` are not in files of earlier versions, whose tolerances were fixed.
    """

    schema_version: Literal[1]
    sentei_version: str
    passed: bool
    engine: Literal["transformers", "vllm", "onnx"]
    dtype: str
    not_run: str
    source_fingerprint: str
    prompts: str
    num_prompts: int
    num_tokens: int
    max_difference: float | None = None
    mean_difference: float | None = None
    median_difference: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    choice_margin: float | None = None
    greedy_margin: float | None = None
    greedy_agreement: float | None = None
    perplexity_ratio: float | None = None
    rounding_max_difference: float | None = None
    rounding_mean_difference: float | None = None
    rounding_median_difference: float | None = None
    rounding_kl_divergence: float | None = None
    rounding_top1_agreement: float | None = None
    rounding_choice_margin: float | None = None
    rounding_greedy_margin: float | None = None
    rounding_greedy_agreement: float | None = None
    rounding_perplexity_ratio: float | None = None
    reference: ReferenceRecord | None = None
    noise: NoiseRecord | None = None
    margins: dict[str, float] | None = None
    tolerances: dict[str, float]
    checks: dict[str, CheckRecord]


_Either = Annotated[ExportVerification | AnswersVerification, Field(discriminator="engine")]


class VerificationDocument(RootModel[_Either]):
    """All of ``verification.json``: ``engine`` says which of the two it is."""

    @property
    def failed_checks(self) -> list[str]:
        """Names of the checks that did not pass."""
        return [name for name, check in self.root.checks.items() if not check.passed]
