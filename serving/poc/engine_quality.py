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
from serving.poc.answers import QUALITY_FILE, AskedQuestion, EngineQuality, interval_of, kept_losses
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.documents import Document, check_document, read_document
from toolchain.errors import SenteiError
from toolchain.evaluate.comparison import perplexity_ratio
from toolchain.evaluate.document import EVALUATION_FILE, EvaluationDocument, TextResult
from toolchain.evaluate.local_tasks import score_user_question
from toolchain.evaluate.own_metrics import parse_metrics
from toolchain.json_files import parse_json
from toolchain.lifetime import end_with_parent
from toolchain.metrics.accuracy import encode_choices
from toolchain.metrics.question_metrics import QuestionMetric
from toolchain.metrics.questions import Question, load_questions, picked
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
    longest = context_length(checkpoint.config).stated
    generation = read_generation_config(checkpoint.directory, read_transformers_config(checkpoint.directory))
    engine = _open(job, max((each.seq_len for each in original.evaluations), default=0), longest)
    try:
        ratios = {
            each.text: interval_of(
                perplexity_ratio(
                    kept_losses(Path(job.original), each),
                    _losses(engine, text, each, tokenizer, bos),
                )
            )
            for text, each in zip(job.texts, original.evaluations, strict=True)
        }
        # A chat template writes it itself.
        begins = None if job.chat_template else bos
        reads = Reads(tokenizer=tokenizer, longest=longest, bos=begins, chat_template=job.chat_template)
        questions = {Path(file).name: _answers(engine, Path(file), reads) for file in job.questions}
        metrics = {each.label: _metric(engine, each, reads, end_tokens(generation)) for each in asked}
    finally:
        engine.close()
    with new_directory(Path(job.out), force=True) as partial:
        write_text(
            partial / QUALITY_FILE,
            EngineQuality(perplexity=ratios, questions=questions, metrics=metrics).model_dump_json() + "\n",
        )


def _open(job: Job, window: int, longest: int) -> Engine:
    if job.engine == "onnx":
        from serving.engines.onnxruntime import OnnxEngine

        return OnnxEngine(Path(job.export))
    from serving.engines.vllm import VllmEngine

    # Questions may be longer than windows.
    return VllmEngine(Path(job.export), max_model_len=longest if job.questions or job.metrics else window + 1)


def _losses(
    engine: Engine, text: str, read: TextResult, tokenizer: PreTrainedTokenizerBase, bos: int | None
) -> list[float]:
    """The mean loss of each window, in nats per token."""
    windows = load_windows(
        parse_text(text), tokenizer, num_samples=read.num_windows, seq_len=read.seq_len, bos=bos
    )  # fmt: skip
    if windows.sha256 != read.text_sha256:
        raise SenteiError(f"{read.text} is not what the original was evaluated on.", "Has the file changed?")
    return [-fmean(each) for each in _log_likelihoods(engine, windows.ids.tolist())]


@dataclass(frozen=True, kw_only=True)
class Reads:
    """How questions are read: by which tokenizer, how many tokens at most, and what they begin with."""

    tokenizer: PreTrainedTokenizerBase
    longest: int
    bos: int | None
    chat_template: bool


def _answers(engine: Engine, file: Path, reads: Reads) -> list[AskedQuestion]:
    """The score of each question, by the metric that ``sentei evaluate`` takes."""
    questions = load_questions(file)
    return [_score(*each) for each in zip(questions, _totals(engine, questions, file.name, reads), strict=True)]


def _metric(engine: Engine, asked: QuestionMetric, reads: Reads, ends: Sequence[int]) -> Interval:
    """A metric of one's own questions, as ``sentei evaluate`` counts it."""
    if not asked.tokens:
        questions = asked.questions()
        totals = _totals(engine, questions, asked.file.name, reads)
        outcomes = [
            asked.of_choice(each, picked(each.choices, some)) for each, some in zip(questions, totals, strict=True)
        ]
    else:
        open_questions = asked.open_questions()
        prompts = encode_prompts(
            open_questions, reads.tokenizer, asked=asked, longest=reads.longest, bos=reads.bos,
            chat_template=reads.chat_template,
        )  # fmt: skip
        answers = [until_end(engine.generate(prompt, asked.tokens), ends) for prompt in prompts]
        texts = [reads.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        outcomes = [asked.of_answer(*each) for each in zip(open_questions, texts, strict=True)]
    low, high = asked.interval(outcomes)
    return Interval(value=asked.value(outcomes), low=low, high=high)


def _totals(engine: Engine, questions: Sequence[Question], source: str, reads: Reads) -> list[list[float]]:
    """The log-likelihoods of each question's choices, in nats."""
    encoded = encode_choices(
        questions, reads.tokenizer, source=source, seq_len=reads.longest, bos=reads.bos,
        chat_template=reads.chat_template,
    )  # fmt: skip
    found = _log_likelihoods(engine, [each.ids for each in encoded])
    totals = iter([sum(each[choice.start - 1 :]) for each, choice in zip(found, encoded, strict=True)])
    return [[next(totals) for _ in question.choices] for question in questions]


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
