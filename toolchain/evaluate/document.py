"""``evaluation.json``: its schema, which docs/guides/evaluate.md describes, and how it is read and written."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from toolchain.outputs import write_text
from toolchain.plan.plan import ReadIn
from toolchain.significance import Verdict

EVALUATION_FILE = "evaluation.json"
Side = Literal["original", "pruned"]


class Record(BaseModel):
    """Unknown keys are refused, so that a typing error or a newer schema is not read as something missing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextResult(Record):
    """Perplexity of one model on one text.

    ``standard_error`` is of the perplexity, from the spread between windows (delta method); null with one window.
    ``bos`` is the token that each window begins with; null if there is none, and in files from before it was recorded.
    ``chat_template`` says whether the text is chats, which go through the model's chat template.
    """

    model: Side
    directory: str
    text: str
    text_sha256: str
    perplexity: float
    standard_error: float | None
    num_tokens: int
    num_windows: int
    seq_len: int
    bos: int | None = None
    chat_template: bool = False
    duration_s: float | None = None


class Share(Record):
    """A mean score over questions; for right-or-wrong scores the interval is Wilson's, otherwise Student's."""

    value: float
    low: float | None
    high: float | None


class TaskResult(Record):
    """Answers of one model to one task.

    ``scores`` has the mean of each metric of lm-eval's, ``score`` that of ``metric``, the one that is compared.
    ``num_cut`` prompts (one for each choice or generation) were longer than the model's context and lost their
    beginning; null in files from before they were counted. ``bos`` is what each prompt begins with, unless the chat
    template says so. ``num_fewshot`` examples from ``fewshot_source`` (null without any) stand before each question;
    in a group some tasks may be defined with fewer. ``prompts_sha256`` is of every prompt and choice: only results
    where it is equal answer the same questions, asked in the same way. It and ``batch_size`` are null in older files.
    """

    model: Side
    directory: str
    task: str
    source: str
    num_fewshot: int
    fewshot_source: str | None = None
    num_questions: int
    bos: int | None = None
    chat_template: bool = False
    num_cut: int | None = None
    batch_size: int | Literal["auto"] | None = None
    prompts_sha256: str | None = None
    metric: str
    score: Share
    scores: dict[str, float]
    duration_s: float


class MetricResult(Record):
    """A metric of a person's own questions, of one model; :mod:`toolchain.metrics.question_metrics` defines them.

    ``metric`` is as it was asked for, with the name of the file alone. ``num_counted`` of ``num_questions`` questions
    count: for F1 those whose right choice or whose picked choice is the class, otherwise all. The interval of ``score``
    is Wilson's, for F1 Wilson's of the true positives among those that count. ``max_new_tokens`` is null where nothing
    is written. ``questions_sha256`` is of the questions as they were judged.
    """

    model: Side
    directory: str
    metric: str
    source: str
    questions_sha256: str
    higher_is_better: bool
    num_questions: int
    num_counted: int
    max_new_tokens: int | None
    bos: int | None
    chat_template: bool
    score: Share
    duration_s: float


class Change(Record):
    """Pruned against original: a value with its 95 % interval, the test's p-value and what follows at 5 %."""

    value: float
    low: float | None
    high: float | None
    p_value: float | None
    test: str
    verdict: Verdict


class WorsePassage(Record):
    """A document or window that the pruned model reads worse. Losses in nats per token."""

    unit: Literal["document", "window"]
    number: int
    num_tokens: int
    original_loss: float
    pruned_loss: float
    excerpt: str


class TextComparison(Record):
    """``perplexity_ratio`` is pruned over original."""

    text: str
    perplexity_ratio: Change
    worst_passages: list[WorsePassage]


class SeenPassage(Record):
    """A document or window that was read before; ``share`` of it, by passages of 32 tokens."""

    number: int
    share: float
    excerpt: str


class TextOverlap(Record):
    """How much of a text the checkpoint was made with, in calibration or healing: on that it looks better than it is.

    ``share`` is of the text's different passages of 32 tokens, estimated on a sample where much was read. If it is
    above 0, ``num_seen`` of ``num_passages`` documents or windows hold some, and those that hold most are listed.
    """

    text: str
    seen_in: ReadIn
    share: float
    unit: Literal["document", "window"] | None = None
    num_passages: int | None = None
    num_seen: int = 0
    passages: list[SeenPassage] = []


class SubjectComparison(Record):
    """One subject of a task. ``p_value`` is McNemar's, adjusted for the number of subjects (Holm)."""

    subject: str
    num_questions: int
    original: float
    pruned: float
    lost: int
    gained: int
    p_value: float


class WorseQuestion(Record):
    """A question that the original did better.

    A margin is the right choice's log-likelihood minus that of the best other choice, in nats (for ``acc_norm`` each
    divided by its length in characters): above 0 the answer was right.
    """

    id: int
    subject: str | None
    question: str
    right_choice: str
    pruned_choice: str
    original_margin: float
    pruned_margin: float


class TaskComparison(Record):
    """``difference`` is pruned minus original; ``lost`` and ``gained`` count questions that one of them did better."""

    task: str
    metric: str
    difference: Change
    lost: int
    gained: int
    worst_subjects: list[SubjectComparison]
    worst_questions: list[WorseQuestion]


class MetricComparison(Record):
    """``difference`` is pruned minus original; ``lost`` questions went well with the original alone, ``gained`` others.

    With a refusal rate where answers are wanted, a refusal is what does not go well.
    """

    metric: str
    difference: Change
    lost: int
    gained: int


class MeanScore(Record):
    """Mean of the tasks' scores, each task counting the same; ``kept`` is pruned over original."""

    num_tasks: int
    original: float
    pruned: float
    kept: float | None
    difference: Change


class Sample(Record):
    """What both wrote after the same prompt."""

    prompt: str
    original: str
    pruned: str


class GenerationComparison(Record):
    """Greedy continuations of stretches of a text, or of its chats up to where the first answer begins.

    ``token_agreement`` and ``kl_divergence`` (nats per token) are read off along the original's continuation;
    ``common_prefix_tokens`` is the mean length both write alike before they part. ``prompt_tokens`` is the length of
    the prompts, of the longest where they are chats, without BOS.
    """

    text: str
    num_prompts: int
    prompt_tokens: int
    max_new_tokens: int
    repetition_original: float | None
    repetition_pruned: float | None
    repetition_change: Change | None
    distinct_1_original: float | None
    distinct_1_pruned: float | None
    distinct_2_original: float | None
    distinct_2_pruned: float | None
    token_agreement: Share
    kl_divergence: Share
    common_prefix_tokens: float
    samples: list[Sample]
    duration_s: float


def overlap_warning(overlap: TextOverlap) -> str:
    """What to say of a text that was read before."""
    return (
        f"Warning: {100 * overlap.share:.3g} % of {overlap.text} was read in {overlap.seen_in} ({overlap.num_seen} of "
        f"{overlap.num_passages} {overlap.unit}s hold some of it), where the model looks too good."
    )


class EvaluationDocument(Record):
    """All of ``evaluation.json``. What needs two models is empty without ``--against``."""

    schema_version: Literal[1] = 1
    kind: Literal["evaluation"] = "evaluation"
    evaluations: list[TextResult]
    tasks: list[TaskResult] = []
    metrics: list[MetricResult] = []
    text_comparisons: list[TextComparison] = []
    text_overlaps: list[TextOverlap] = []
    task_comparisons: list[TaskComparison] = []
    metric_comparisons: list[MetricComparison] = []
    mean_score: MeanScore | None = None
    generation: GenerationComparison | None = None
    dtype: str | None = None
    versions: dict[str, str] = {}

    def save(self, directory: Path) -> None:
        """Writes ``evaluation.json`` into an existing directory."""
        write_text(directory / EVALUATION_FILE, self.model_dump_json(indent=2) + "\n")
