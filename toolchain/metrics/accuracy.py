"""Accuracy on a person's own multiple-choice questions, as the search can use it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.json_files import read_json_lines
from toolchain.model.layer_walk import LayerWalk
from toolchain.text.chat_template import ChatTemplate
from toolchain.text.chats import check_template

# Scripts that put no space between words start here: CJK radicals; Latin, Greek, Arabic and the like lie below.
_FIRST_WITHOUT_SPACES = "\u2e80"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and its possible answers.

    Attributes:
        prompt: What the model reads.
        choices: Continuations it compares.
        answer: Which of them is right.
        subject: What it is about, if the file says so.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    subject: str | None = None


class AccuracyMetric:
    """Share of questions whose right choice has the highest log-likelihood per character.

    The same score as ``acc_norm`` of lm-eval: log-likelihood of the choice's tokens after the prompt, divided by the
    choice's length in characters. A space joins prompt and choice unless one is there or their script has none. Ties go
    to the first choice.
    """

    name: str = "accuracy"
    higher_is_better: bool = True

    def __init__(
        self,
        questions: list[Question],
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: str,
        seq_len: int,
        bos: int | None = None,
        chat_template: bool = False,
    ) -> None:
        """Tokenises; prompts are cut from the left to ``seq_len`` tokens, the first of which is ``bos`` if given.

        Args:
            questions: What is asked.
            tokenizer: The model's own.
            source: Name of the file.
            seq_len: Tokens of prompt and choice.
            bos: See :func:`toolchain.model.loading.bos_of`.
            chat_template: A prompt is a user's turn in the model's chat template, and a choice the answer.

        Raises:
            SenteiError: A choice alone is longer than ``seq_len``, or there is no chat template.
        """
        self.source: str | None = f"{source}, in the chat template" if chat_template else source
        asked = json.dumps([asdict(question) for question in questions])
        self.source_sha256: str | None = hashlib.sha256(asked.encode()).hexdigest()
        encoded = encode_choices(
            questions, tokenizer, source=source, seq_len=seq_len, bos=bos, chat_template=chat_template
        )
        rows = [each.ids for each in encoded]
        positions = [
            (row, place - 1, each.ids[place])
            for row, each in enumerate(encoded)
            for place in range(each.start, len(each.ids))
        ]
        self._lengths = [len(choice) for question in questions for choice in question.choices]
        self._questions = questions
        longest = max(map(len, rows))
        # What follows a sequence cannot change what a causal model made of it.
        self.ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        self._row, self._place, self._target = torch.tensor(positions).T

    def prepare(self, walk: LayerWalk) -> None:
        """See :class:`toolchain.metrics.token_metrics.StateMetric`."""

    def __call__(self, walk: LayerWalk, hidden: torch.Tensor) -> float:
        """See :class:`toolchain.metrics.token_metrics.StateMetric`."""
        states = hidden[self._row.to(hidden.device), self._place.to(hidden.device)]
        losses = walk.losses(states, self._target.to(hidden.device)).double().cpu()
        totals = torch.zeros(len(self.ids), dtype=torch.float64).index_add(0, self._row, -losses)
        scores = (totals / torch.tensor(self._lengths)).split([len(question.choices) for question in self._questions])
        right = [int(row.argmax()) == question.answer for row, question in zip(scores, self._questions, strict=True)]
        return sum(right) / len(right) if bool(torch.isfinite(totals).all()) else float("nan")


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
    """Every choice of every question, in order; see :class:`AccuracyMetric`.

    Raises:
        SenteiError: A choice alone is longer than ``seq_len``, or there is no chat template.
    """
    encoded = []
    prompts = _chats(tokenizer, questions) if chat_template else [each.prompt.rstrip() for each in questions]
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


def load_questions(path: Path) -> list[Question]:
    """Reads a JSONL file with the fields ``prompt``, ``choices`` and ``answer`` (the index of the right choice).

    A line may also have a ``subject``.

    Raises:
        SenteiError: Missing or empty file, or a line that is not such a question.
    """
    return [_question(where, raw) for where, raw in read_questions(path)]


def read_questions(path: Path) -> list[tuple[str, Any]]:
    """The lines of a file of questions that are not blank, each behind the words that name its place.

    Raises:
        SenteiError: There is no such file, nothing in it, or a line is not JSON.
    """
    if not path.is_file():
        raise SenteiError(f"File of questions {path} does not exist.")
    found = list(read_json_lines(path))
    if not found:
        raise SenteiError(f"{path} holds no question.")
    return found


def _question(where: str, raw: Any) -> Question:
    try:
        prompt, choices, answer, subject = raw["prompt"], raw["choices"], raw["answer"], raw.get("subject")
    except (KeyError, TypeError, AttributeError) as error:
        raise SenteiError(f"{where} is not a JSON object with prompt, choices and answer.") from error
    if not isinstance(prompt, str) or not prompt:
        raise SenteiError(f"{where}: prompt must be a text.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise SenteiError(f"{where}: choices must be a list of two texts or more.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise SenteiError(f"{where}: answer must be an index of choices, 0 to {len(choices) - 1}.")
    if subject is not None and not isinstance(subject, str):
        raise SenteiError(f"{where}: subject must be a text.")
    return Question(prompt=prompt, choices=tuple(choices), answer=answer, subject=subject)


def split_prompt(prompt: str, choice: str) -> tuple[str, str]:
    """What the model reads, and what it then compares: spaces between them go with the choice, as in lm-eval."""
    context = prompt.rstrip()
    between = prompt[len(context) :]
    if not between and not choice[0].isspace() and prompt[-1] < _FIRST_WITHOUT_SPACES:
        between = " "
    return context, between + choice


def _chats(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    """What a server makes of each prompt as a user's turn, up to where the answer begins."""
    check_template(tokenizer, "--chat-template takes")
    with ChatTemplate(tokenizer) as template:
        return [template.render([{"role": "user", "content": each.prompt.rstrip()}]) for each in questions]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, bos: int | None
) -> tuple[int, list[int]]:
    """How many tokens the prompt has, and all tokens of prompt and choice."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + continuation)]
    # A prompt may have been written with it; lm-eval does not double it either.
    if bos is not None and encoded[1][:1] != [bos]:
        encoded = [[bos, *ids] for ids in encoded]
    return min(len(encoded[0]), len(encoded[1]) - 1), encoded[1]
