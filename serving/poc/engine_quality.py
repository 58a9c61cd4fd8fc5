"""Quality of a rounded export in the engine that serves it: ``python -m serving.poc.engine_quality JOB``.

``sentei evaluate`` reads checkpoints in Transformers, which does not compute with an export's rounded matrices and
inputs. So the same windows and the same questions are put to the export in ONNX Runtime or vLLM, and compared, one by
one, with the original's answers, which ``sentei evaluate`` has kept.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from serving.decision.document import Interval
from serving.engines.transformers import Engine
from serving.forecast.model_facts import facts_of
from serving.poc.answers import QUALITY_FILE, AskedQuestion, EngineQuality, interval_of, kept_losses
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.checkpoint.quantized import open_servable
from toolchain.documents import Document, check_document, read_document
from toolchain.errors import SenteiError
from toolchain.evaluate.comparison import perplexity_ratio
from toolchain.evaluate.document import EVALUATION_FILE, EvaluationDocument, TextResult
from toolchain.evaluate.local_tasks import score_user_question
from toolchain.evaluate.own_metrics import parse_metrics
from toolchain.json_files import parse_json
from toolchain.lifetime import end_with_parent
from toolchain.metrics.accuracy import EncodedChoice, encode_choices
from toolchain.metrics.question_metrics import QuestionMetric
from toolchain.metrics.questions import OpenQuestion, Question, load_questions, picked
from toolchain.metrics.written import encode_prompts, until_end
from toolchain.model.context_length import context_length
from toolchain.model.loading import (
    bos_of,
    end_tokens,
    load_tokenizer,
    read_generation_config,
    read_transformers_config,
)
from toolchain.outputs import new_directory, write_text
from toolchain.text.sources import parse_text
from toolchain.text.windows import load_windows

# Sequences whose log-probabilities are in memory at once.
_BATCH = {"onnx": 1, "vllm": 32}


class Job(Document):
    """What is asked, as JSON on the command line.

    Attributes:
        engine: ``onnx`` or ``vllm``.
        model: The original's directory, whose tokenizer reads.
        export: What answers.
        original: The original's evaluation.
        out: The directory to write.
        texts: As ``sentei evaluate --text`` takes them.
        questions: Files.
        metrics: Of one's own questions, as ``sentei evaluate --metric`` takes them.
        chat_template: Whether questions go through it.
    """

    engine: str
    model: str
    export: str
    original: str
    out: str
    texts: list[str]
    questions: list[str]
    metrics: list[str] = Field(default_factory=list)
    chat_template: bool


def main() -> None:
    """Runs a job; an error ends with one sentence on stderr and exit code 2."""
    end_with_parent()
    try:
        run(check_document(parse_json(sys.argv[1], "The job"), "The job", Job))
    except SenteiError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run(job: Job) -> None:
    """Writes ``engine_quality.json``.

    Raises:
        SenteiError: Something is missing, or the windows are not those that the original read.
    """
    tokenizer = load_tokenizer(Path(job.model))
    checkpoint = open_checkpoint(Path(job.model))
    bos = bos_of(checkpoint.family, tokenizer)
    asked = parse_metrics(job.metrics)
    original = read_document(Path(job.original) / EVALUATION_FILE, EvaluationDocument)
    generation = read_generation_config(checkpoint.directory, read_transformers_config(checkpoint.directory))
    reads = _reads(job, tokenizer, context_length(checkpoint.config).stated, bos)
    # In tokens before the engine starts, which has to know how long they are.
    windows = [
        _windows(text, each, reads, bos, most=reads.num_compared if job.engine == "vllm" else None)
        for text, each in zip(job.texts, original.evaluations, strict=True)
    ]
    files = [Path(file) for file in job.questions]
    questions = {file.name: _choices(load_questions(file), file.name, reads) for file in files}
    metrics = [(each, _asked_of(each, reads)) for each in asked]
    parts = [*windows, *questions.values(), *(part for _, part in metrics)]
    engine = _open(job, max((each.longest for each in parts), default=1))
    try:
        ratios = {
            each.text: interval_of(
                perplexity_ratio(
                    kept_losses(Path(job.original), each, num_tokens=part.num_tokens),
                    [-fmean(found) for found in _log_likelihoods(engine, part.ids)],
                )
            )
            for part, each in zip(windows, original.evaluations, strict=True)
        }
        answers = {name: _answers(engine, part) for name, part in questions.items()}
        measured = {each.label: _metric(engine, each, part, reads, end_tokens(generation)) for each, part in metrics}
    finally:
        engine.close()
    with new_directory(Path(job.out), force=True) as partial:
        write_text(
            partial / QUALITY_FILE,
            EngineQuality(perplexity=ratios, questions=answers, metrics=measured).model_dump_json() + "\n",
        )


@dataclass(frozen=True, kw_only=True)
class Reads:
    """How texts and questions are read.

    Attributes:
        tokenizer: The original's.
        longest: Tokens at most, the answer's included.
        num_compared: Tokens at most of what is only read: vLLM writes one after it.
        bos: What a question begins with.
        chat_template: Whether questions go through it.
    """

    tokenizer: PreTrainedTokenizerBase
    longest: int
    num_compared: int
    bos: int | None
    chat_template: bool


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of a text, in tokens."""

    ids: Sequence[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of a window that have a loss."""
        return len(self.ids[0]) - 1

    @property
    def longest(self) -> int:
        """Tokens that the engine has to take at once."""
        return len(self.ids[0]) + 1


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Questions, and the tokens of all their choices in order."""

    questions: Sequence[Question]
    encoded: Sequence[EncodedChoice]

    @property
    def longest(self) -> int:
        """See :class:`Windows`."""
        return max(len(each.ids) for each in self.encoded) + 1


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Questions, the tokens of their prompts, and how many are written after each."""

    questions: Sequence[OpenQuestion]
    ids: Sequence[list[int]]
    num_written: int

    @property
    def longest(self) -> int:
        """See :class:`Windows`."""
        return max(map(len, self.ids)) + self.num_written


def _reads(job: Job, tokenizer: PreTrainedTokenizerBase, stated: int, bos: int | None) -> Reads:
    return Reads(
        tokenizer=tokenizer, longest=stated, num_compared=stated - (job.engine == "vllm"),
        # A chat template writes it itself.
        bos=None if job.chat_template else bos, chat_template=job.chat_template,
    )  # fmt: skip


def _windows(text: str, read: TextResult, reads: Reads, bos: int | None, *, most: int | None) -> Windows:
    """The windows that the original read, each without what is beyond ``most`` tokens."""
    windows = load_windows(
        parse_text(text), reads.tokenizer, num_samples=read.num_windows, seq_len=read.seq_len, bos=bos
    )  # fmt: skip
    if windows.sha256 != read.text_sha256:
        raise SenteiError(f"{read.text} is not what the original was evaluated on.", "Has the file changed?")
    return Windows(ids=windows.ids[:, :most].tolist())


def _choices(questions: Sequence[Question], source: str, reads: Reads) -> Choices:
    encoded = encode_choices(
        questions, reads.tokenizer, source=source, seq_len=reads.num_compared, bos=reads.bos,
        chat_template=reads.chat_template,
    )  # fmt: skip
    return Choices(questions=questions, encoded=encoded)


def _asked_of(asked: QuestionMetric, reads: Reads) -> Choices | Prompts:
    """The questions of a metric."""
    if not asked.tokens:
        return _choices(asked.questions(), asked.file.name, reads)
    questions = asked.open_questions()
    ids = encode_prompts(
        questions, reads.tokenizer, asked=asked, longest=reads.longest, bos=reads.bos,
        chat_template=reads.chat_template,
    )  # fmt: skip
    return Prompts(questions=questions, ids=ids, num_written=asked.tokens)


def _open(job: Job, longest: int) -> Engine:
    if job.engine == "onnx":
        from serving.engines.onnxruntime import OnnxEngine

        return OnnxEngine(Path(job.export))
    from serving.engines.vllm import KV_CACHE_BYTES, VllmEngine

    # vLLM does not start unless its cache holds the longest request.
    facts = facts_of(open_servable(Path(job.export)), None, size_on_disk_bytes=0)
    options = {"kv_cache_memory_bytes": max(KV_CACHE_BYTES, facts.kv_bytes_to_start(longest))}
    return VllmEngine(Path(job.export), max_model_len=longest, options=options)


def _answers(engine: Engine, asked: Choices) -> list[AskedQuestion]:
    """The score of each question, by the metric that ``sentei evaluate`` takes."""
    return [_score(*each) for each in zip(asked.questions, _totals(engine, asked), strict=True)]


def _metric(
    engine: Engine, asked: QuestionMetric, part: Choices | Prompts, reads: Reads, ends: Sequence[int]
) -> Interval:
    """A metric of one's own questions, as ``sentei evaluate`` counts it."""
    if isinstance(part, Choices):
        outcomes = [
            asked.of_choice(each, picked(each.choices, some))
            for each, some in zip(part.questions, _totals(engine, part), strict=True)
        ]
    else:
        answers = [until_end(engine.generate(prompt, part.num_written), ends) for prompt in part.ids]
        texts = [reads.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        outcomes = [asked.of_answer(*each) for each in zip(part.questions, texts, strict=True)]
    low, high = asked.interval(outcomes)
    return Interval(value=asked.value(outcomes), low=low, high=high)


def _totals(engine: Engine, asked: Choices) -> list[list[float]]:
    """The log-likelihoods of each question's choices, in nats."""
    found = _log_likelihoods(engine, [each.ids for each in asked.encoded])
    totals = iter([sum(each[choice.start - 1 :]) for each, choice in zip(found, asked.encoded, strict=True)])
    return [[next(totals) for _ in question.choices] for question in asked.questions]


def _score(question: Question, totals: Sequence[float]) -> AskedQuestion:
    asked = {"choices": question.choices, "answer": question.answer}
    scores = score_user_question(asked, [(each, False) for each in totals])
    return AskedQuestion(subject=question.subject, score=scores["acc_norm"])


def _log_likelihoods(engine: Engine, sequences: Sequence[list[int]]) -> Iterator[list[float]]:
    """Log-probabilities of each sequence's tokens from the second on."""
    batch = _BATCH[engine.name]
    for start in range(0, len(sequences), batch):
        some = sequences[start : start + batch]
        for ids, positions in zip(some, engine.top_log_probabilities(some, 1), strict=True):
            yield [found[token] for token, found in zip(ids[1:], positions, strict=True)]


if __name__ == "__main__":
    main()
