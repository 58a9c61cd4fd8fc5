"""Which metric a person means by ``--metric``."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.metrics.accuracy import AccuracyMetric, load_questions
from toolchain.metrics.function import FunctionMetric, load_function
from toolchain.metrics.token_metrics import KLDivergence, Metric, PerplexityMetric

# Those that are measured on text.
TOKEN_METRICS = ("perplexity", "kl")
_HINT = "Use perplexity, kl, accuracy:FILE.jsonl or package.module:function."


def choose_metric(
    name: str,
    ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bos: int | None = None,
    chat_template: bool = False,
) -> Metric:
    """Makes the metric.

    Args:
        name: ``perplexity``, ``kl``, ``accuracy:FILE`` or ``package.module:function``.
        ids: Calibration text for the first two, int64 ``[num_sequences, seq_len]``; its length bounds the questions'.
        tokenizer: The model's own.
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
    if kind == "accuracy":
        if (questions := question_file(name)) is None:
            raise SenteiError("--metric accuracy needs questions.", "Write accuracy:FILE.jsonl.")
        return AccuracyMetric(
            load_questions(questions), tokenizer, source=questions.name, seq_len=ids.shape[1], bos=bos,
            chat_template=chat_template,
        )  # fmt: skip
    if not kind or not rest:
        raise SenteiError(f"--metric {name!r} is not known.", _HINT)
    return FunctionMetric(name, load_function(name), tokenizer)


def question_file(name: str) -> Path | None:
    """The file that ``accuracy:FILE`` reads; ``None`` for any other metric."""
    kind, _, rest = name.partition(":")
    return Path(rest) if kind == "accuracy" and rest else None
