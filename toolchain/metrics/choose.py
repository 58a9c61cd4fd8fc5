"""Which metric a person means by ``--metric``."""

import torch
from transformers import PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.metrics.accuracy import ChoicesMetric
from toolchain.metrics.function import FunctionMetric, load_function
from toolchain.metrics.question_metrics import WRITTEN, QuestionMetric, parse_question_metric
from toolchain.metrics.token_metrics import KLDivergence, Metric, PerplexityMetric
from toolchain.metrics.written import WrittenMetric

# Those that are measured on text.
TOKEN_METRICS = ("perplexity", "kl")
_HINT = (
    "Use perplexity, kl, accuracy:FILE.jsonl, f1:FILE.jsonl#class=TEXT, refusal_rate:FILE.jsonl#wanted=refusals, "
    "valid_json:FILE.jsonl or package.module:function."
)


def choose_metric(
    name: str,
    ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int | None = None,
    bos: int | None = None,
    chat_template: bool = False,
) -> Metric:
    """Makes the metric.

    Args:
        name: ``perplexity``, ``kl``, one of :mod:`toolchain.metrics.question_metrics`, or ``package.module:function``.
        ids: Calibration text for the first two, int64 ``[num_sequences, seq_len]``; its length bounds that of questions
            with choices.
        tokenizer: The model's own.
        longest: Tokens that the model reads, which bounds prompts with written answers; by default those of ``ids``.
        bos: What questions begin with, as the text does; see :func:`toolchain.model.loading.bos_of`.
        chat_template: Ask questions through the model's chat template.

    Raises:
        SenteiError: There is no such metric, file, function or chat template.
    """
    kind, _, rest = name.partition(":")
    if name == "perplexity":
        return PerplexityMetric(ids)
    if name == "kl":
        return KLDivergence(ids)
    if (asked := parse_question_metric(name)) is not None:
        return metric_of_questions(
            asked, tokenizer, seq_len=ids.shape[1], longest=longest or ids.shape[1], bos=bos,
            chat_template=chat_template,
        )  # fmt: skip
    if not kind or not rest:
        raise SenteiError(f"--metric {name!r} is not known.", _HINT)
    return FunctionMetric(name, load_function(name), tokenizer)


def metric_of_questions(
    asked: QuestionMetric,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    longest: int,
    bos: int | None = None,
    chat_template: bool = False,
) -> ChoicesMetric | WrittenMetric:
    """Reads the questions of a metric; see :func:`choose_metric`.

    Args:
        asked: The metric.
        tokenizer: The model's own.
        seq_len: Tokens of a prompt with a choice.
        longest: Tokens of a prompt with a written answer.
        bos: What questions begin with.
        chat_template: Ask through the model's chat template.

    Raises:
        SenteiError: A bad file, or a question that is too long.
    """
    if asked.kind in WRITTEN:
        return WrittenMetric(
            asked.open_questions(), tokenizer, asked=asked, longest=longest, bos=bos, chat_template=chat_template
        )
    return ChoicesMetric(
        asked.questions(), tokenizer, asked=asked, seq_len=seq_len, bos=bos, chat_template=chat_template
    )
