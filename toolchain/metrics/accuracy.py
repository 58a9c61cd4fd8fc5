"""Accuracy and F1 on a person's own multiple-choice questions, as the search can use them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.metrics.question_metrics import CountingMetric, Outcome, QuestionMetric
from toolchain.metrics.questions import Question, picked
from toolchain.model.layer_walk import LayerWalk
from toolchain.text.chats import as_chats

# Scripts that put no space between words start here: CJK radicals; Latin, Greek, Arabic and the like lie below.
_FIRST_WITHOUT_SPACES = "\u2e80"


class ChoicesMetric(CountingMetric):
    """A metric of the choices that a model takes: accuracy, or F1 of one of them.

    It takes the one with the highest log-likelihood of the choice's tokens after the prompt, divided by the choice's
    length in characters. A space joins prompt and choice unless one is there or their script has none.
    """

    def __init__(
        self,
        questions: list[Question],
        tokenizer: PreTrainedTokenizerBase,
        *,
        asked: QuestionMetric,
        seq_len: int,
        bos: int | None = None,
        chat_template: bool = False,
    ) -> None:
        """Tokenises; prompts are cut from the left to ``seq_len`` tokens, the first of which is ``bos`` if given.

        Args:
            questions: What is asked.
            tokenizer: The model's own.
            asked: What is counted.
            seq_len: Tokens of prompt and choice.
            bos: See :func:`toolchain.model.loading.bos_of`.
            chat_template: A prompt is a user's turn in the model's chat template, and a choice the answer.

        Raises:
            SenteiError: A choice alone is longer than ``seq_len``, or there is no chat template.
        """
        super().__init__(asked, questions, chat_template=chat_template)
        self._questions = questions
        encoded = encode_choices(
            questions, tokenizer, source=asked.file.name, seq_len=seq_len, bos=bos, chat_template=chat_template
        )
        rows = [each.ids for each in encoded]
        positions = [
            (row, place - 1, each.ids[place])
            for row, each in enumerate(encoded)
            for place in range(each.start, len(each.ids))
        ]
        longest = max(map(len, rows))
        # What follows a sequence cannot change what a causal model made of it.
        self.ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        self._row, self._place, self._target = torch.tensor(positions).T

    def prepare(self, walk: LayerWalk) -> None:
        """See :class:`toolchain.metrics.token_metrics.StateMetric`."""

    def __call__(self, walk: LayerWalk, hidden: torch.Tensor) -> float:
        """See :class:`toolchain.metrics.token_metrics.StateMetric`."""
        totals = self.log_likelihoods(walk, hidden)
        return self._asked.value(self.outcomes(totals)) if bool(torch.isfinite(totals).all()) else float("nan")

    def log_likelihoods(self, walk: LayerWalk, hidden: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Of choices, float64 on the CPU, in nats.

        Args:
            walk: Over the model.
            hidden: What left its last layer, for as many rows of ``ids`` as it has.
            first: The first of these rows.
        """
        own = (self._row >= first) & (self._row < first + len(hidden))
        rows = self._row[own] - first
        states = hidden[rows.to(hidden.device), self._place[own].to(hidden.device)]
        losses = walk.losses(states, self._target[own].to(hidden.device)).double().cpu()
        return torch.zeros(len(hidden), dtype=torch.float64).index_add(0, rows, -losses)

    def outcomes(self, log_likelihoods: torch.Tensor) -> list[Outcome]:
        """What each question counts as, from the log-likelihoods of all choices."""
        each = log_likelihoods.split([len(question.choices) for question in self._questions])
        pairs = zip(self._questions, each, strict=True)
        return [self._asked.of_choice(question, picked(question.choices, row.tolist())) for question, row in pairs]


@dataclass(frozen=True, kw_only=True)
class EncodedChoice:
    """A prompt with one of its choices.

    Attributes:
        ids: Tokens of both.
        start: The place of the first token that is the choice's.
    """

    ids: list[int]
    start: int


def encode_choices(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    seq_len: int,
    bos: int | None = None,
    chat_template: bool = False,
) -> list[EncodedChoice]:
    """Every choice of every question, in order; see :class:`ChoicesMetric`.

    Raises:
        SenteiError: A choice alone is longer than ``seq_len``, or there is no chat template.
    """
    encoded = []
    prompts = (
        as_chats(tokenizer, [each.prompt for each in questions])
        if chat_template
        else [each.prompt.rstrip() for each in questions]
    )
    for number, (question, context) in enumerate(zip(questions, prompts, strict=True), 1):
        for choice in question.choices:
            continuation = choice if chat_template else split_prompt(question.prompt, choice)[1]
            prompt, whole = _tokenize(tokenizer, context, continuation, None if chat_template else bos)
            num_kept = int(bos is not None and whole[:1] == [bos])
            if len(whole) - prompt >= seq_len:
                raise SenteiError(
                    f"{source} question {number}: a choice has {len(whole) - prompt} tokens, and --seq-len is "
                    f"{seq_len}.",
                    "Raise --seq-len.",
                )
            cut = max(0, len(whole) - seq_len)
            ids = whole[:num_kept] + whole[num_kept + cut :]
            encoded.append(EncodedChoice(ids=ids, start=max(prompt - cut, 1)))
    return encoded


def split_prompt(prompt: str, choice: str) -> tuple[str, str]:
    """What the model reads, and what it then compares: spaces between them go with the choice, as in lm-eval."""
    context = prompt.rstrip()
    between = prompt[len(context) :]
    if not between and not choice[0].isspace() and prompt[-1] < _FIRST_WITHOUT_SPACES:
        between = " "
    return context, between + choice


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, bos: int | None
) -> tuple[int, list[int]]:
    """How many tokens the prompt has, and all tokens of prompt and choice."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + continuation)]
    # A prompt may have been written with it; lm-eval does not double it either.
    if bos is not None and encoded[1][:1] != [bos]:
        encoded = [[bos, *ids] for ids in encoded]
    return min(len(encoded[0]), len(encoded[1]) - 1), encoded[1]
