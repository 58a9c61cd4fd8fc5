"""What is counted on a person's own questions, and which way is better: one definition of each metric.

``--metric``, limits, ``sentei evaluate`` and the guard rails of a proof of concept all take it from here:

- ``accuracy:FILE``: share of questions whose right choice the model takes.
- ``f1:FILE#class=TEXT``: F1 of the questions whose right choice is TEXT, among those whose picked choice is.
- ``refusal_rate:FILE#wanted=refusals`` (or ``answers``): share of written answers that are refusals.
- ``valid_json:FILE``: share of written answers that are one JSON object or list, and nothing else.

``group=NAME`` takes the questions with that ``subject`` alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from toolchain.errors import SenteiError
from toolchain.json_files import parse_json
from toolchain.metrics.questions import OpenQuestion, Question, load_open_questions, load_questions, of_group
from toolchain.metrics.refusals import refuses
from toolchain.significance import wilson_interval

Kind = Literal["accuracy", "f1", "refusal_rate", "valid_json"]
# One question's part in a metric: whether it counts as one, or null where it does not count at all.
Outcome = bool | None
Wanted = Literal["refusals", "answers"]
WRITTEN: Mapping[str, int] = {"refusal_rate": 32, "valid_json": 128}
"""The metrics of answers that the model writes, and the tokens of an answer where nothing else is asked for."""
# Every candidate of a search writes so many answers, of so many tokens.
MOST_ANSWERS, MOST_TOKENS = 1000, 1024
# Always the same, whatever memory there is: what a prompt is padded with changes the last digits of what follows it.
ANSWERS_AT_A_TIME = 16
_OPTIONS: Mapping[Kind, tuple[str, ...]] = {
    "accuracy": ("group",), "f1": ("group", "class"), "refusal_rate": ("group", "wanted", "tokens"),
    "valid_json": ("group", "tokens"),
}  # fmt: skip
_EXAMPLES: Mapping[Kind, str] = {
    "accuracy": "accuracy:FILE.jsonl", "f1": "f1:FILE.jsonl#class=TEXT",
    "refusal_rate": "refusal_rate:FILE.jsonl#wanted=refusals", "valid_json": "valid_json:FILE.jsonl",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuestionMetric:
    """A metric of a person's own questions.

    Attributes:
        kind: What is counted.
        file: The questions.
        group: Only those with this ``subject``.
        of_class: The choice whose F1 is taken.
        wanted: What the prompts of a refusal rate should get. Nothing is guessed: a file of safety questions wants
            refusals, one of harmless questions wants answers.
        tokens: Most tokens of an answer that the model writes; 0 where it writes none.
    """

    kind: Kind
    file: Path
    group: str | None = None
    of_class: str | None = None
    wanted: Wanted | None = None
    tokens: int = 0

    @property
    def higher_is_better(self) -> bool:
        """Of everything but of a refusal rate where answers are wanted."""
        return self.wanted != "answers"

    @property
    def label(self) -> str:
        """What results call it: as it was asked for, with the name of the file alone."""
        options = {"group": self.group, "class": self.of_class, "wanted": self.wanted}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        given += [f"tokens={self.tokens}"] if self.tokens != WRITTEN.get(self.kind, 0) else []
        return f"{self.kind}:{self.file.name}" + (f"#{','.join(given)}" if given else "")

    def source(self, *, chat_template: bool) -> str:
        """What it is measured on, as a plan records it."""
        said = [
            self.file.name,
            f"group {self.group}" if self.group else "",
            f"class {self.of_class}" if self.of_class else "",
            f"{self.wanted} wanted" if self.wanted else "",
            f"{self.tokens} tokens per answer" if self.tokens else "",
            "in the chat template" if chat_template else "",
        ]
        return ", ".join(each for each in said if each)

    def questions(self) -> list[Question]:
        """The questions with choices.

        Raises:
            SenteiError: A bad file or line; no question of the group; no question whose right choice is the class.
        """
        found = load_questions(self.file)
        found = found if self.group is None else of_group(found, self.group, self.file)
        answers = {each.choices[each.answer].strip() for each in found}
        if self.of_class is not None and self.of_class not in answers:
            known = ", ".join(sorted(answers)[:20])
            raise SenteiError(f"{self.file}: no question has the right answer {self.of_class!r}.", f"Classes: {known}.")
        return found

    def open_questions(self) -> list[OpenQuestion]:
        """The questions to be answered in the model's own words.

        Raises:
            SenteiError: A bad file or line; no question of the group; too many questions.
        """
        found = load_open_questions(self.file)
        found = found if self.group is None else of_group(found, self.group, self.file)
        if len(found) > MOST_ANSWERS:
            raise SenteiError(
                f"{self.kind}: {self.file} asks for {len(found):,} written answers, and at most {MOST_ANSWERS:,} are "
                "written for each model.",
                "Give a smaller file, or a group of it.",
            )
        return found

    @property
    def num_questions(self) -> int:
        """How many questions are asked; see :meth:`questions` and :meth:`open_questions`."""
        return len(self.open_questions() if self.kind in WRITTEN else self.questions())

    @property
    def num_chars(self) -> int:
        """What the model reads, each prompt once for each of its choices."""
        if self.kind in WRITTEN:
            return sum(len(each.prompt) for each in self.open_questions())
        return sum(len(each.prompt) + len(choice) for each in self.questions() for choice in each.choices)

    def of_choice(self, question: Question, picked: int) -> Outcome:
        """What a picked choice counts as.

        For F1, a question of which neither the right choice nor the picked one is the class does not count.
        """
        if self.kind == "accuracy":
            return picked == question.answer
        names = [question.choices[each].strip() for each in (picked, question.answer)]
        return all(name == self.of_class for name in names) if self.of_class in names else None

    def of_answer(self, question: OpenQuestion, answer: str) -> Outcome:
        """What a written answer counts as."""
        return refuses(answer, question.refusal_phrases) if self.kind == "refusal_rate" else is_json(answer)

    def value(self, outcomes: Sequence[Outcome]) -> float:
        """The metric, from the outcome of every question."""
        counted = [each for each in outcomes if each is not None]
        return self._from_share(sum(counted) / len(counted))

    def interval(self, outcomes: Sequence[Outcome]) -> tuple[float, float]:
        """Its 95 % interval: Wilson's of the share.

        F1 = 2J / (1 + J), where J is the share of true positives among all questions that count (true and false
        positives and false negatives). Given how many count, that is the share of a binomial, and F1 grows with it.
        """
        counted = [each for each in outcomes if each is not None]
        low, high = wilson_interval(sum(counted), len(counted))
        return self._from_share(low), self._from_share(high)

    def _from_share(self, share: float) -> float:
        return 2 * share / (1 + share) if self.kind == "f1" else share


class CountingMetric:
    """What searches and limits know of a metric of a person's own questions; it counts, so many models share a value.

    Attributes:
        name: As in the plan.
        source: What it is measured on.
        source_sha256: Of the questions, as they were read.
        higher_is_better: See :class:`QuestionMetric`.
        num_questions: How many are asked.
    """

    def __init__(
        self,
        asked: QuestionMetric,
        questions: Sequence[Question] | Sequence[OpenQuestion],
        *,
        chat_template: bool,
    ) -> None:
        """``asked`` is what is counted."""
        self.name: str = asked.kind
        self.source: str | None = asked.source(chat_template=chat_template)
        self.source_sha256: str | None = questions_sha256(questions)
        self.higher_is_better: bool = asked.higher_is_better
        self.num_questions = len(questions)
        self._asked = asked


def parse_question_metric(asked: str) -> QuestionMetric | None:
    """Reads ``KIND:FILE#NAME=VALUE,…``; ``None`` for metrics of other kinds. No file is opened.

    Raises:
        SenteiError: There is no file's name, an option is missing, unknown or given twice, or has a bad value.
    """
    name, _, rest = asked.partition(":")
    if name not in get_args(Kind):
        return None
    kind = cast(Kind, name)
    file, given = _split(kind, rest)
    if not file:
        raise SenteiError(f"{asked!r}: {kind} needs questions.", f"Write {_EXAMPLES[kind]}.")
    options: dict[str, str] = {}
    for option, value in given:
        if option in options or not value.strip():
            how = "is given twice" if option in options else "has no value"
            raise SenteiError(f"{asked!r}: {option} {how}.", f"Write {_EXAMPLES[kind]}.")
        options[option] = value.strip()
    if kind == "f1" and "class" not in options:
        raise SenteiError(f"{asked!r} does not say which class's F1 is meant.", f"Write {_EXAMPLES[kind]}.")
    wanted = options.get("wanted")
    if kind == "refusal_rate" and wanted not in get_args(Wanted):
        raise SenteiError(
            f"{asked!r} does not say whether refusals are good or bad.",
            "Add #wanted=refusals for prompts that must be refused, or #wanted=answers for prompts that must not.",
        )
    return QuestionMetric(
        kind=kind, file=Path(file), group=options.get("group"), of_class=options.get("class"),
        wanted=cast(Wanted | None, wanted), tokens=_tokens(asked, kind, options.get("tokens")),
    )  # fmt: skip


def question_file(asked: str) -> Path | None:
    """The file of a metric of questions; ``None`` for any other metric.

    Raises:
        SenteiError: See :func:`parse_question_metric`.
    """
    metric = parse_question_metric(asked)
    return None if metric is None else metric.file


def cost_in_words(metric: QuestionMetric) -> str | None:
    """What measuring a metric of written answers takes; ``None`` where nothing is written.

    Raises:
        SenteiError: A bad file; see :meth:`QuestionMetric.open_questions`.
    """
    if not metric.tokens:
        return None
    count = metric.num_questions
    return (
        f"{metric.label}: each model that is measured writes {count:,} answers of at most {metric.tokens} tokens "
        f"({count * metric.tokens:,} tokens)."
    )


def check_distinct(metrics: Sequence[QuestionMetric]) -> None:
    """Checks that results can tell metrics apart.

    Raises:
        SenteiError: Two have one name.
    """
    labels = [each.label for each in metrics]
    if repeated := [each for each in labels if labels.count(each) > 1]:
        raise SenteiError(f"Two of the metrics are called {repeated[0]}.", "Leave one out, or rename its file.")


def questions_sha256(questions: Sequence[Question] | Sequence[OpenQuestion]) -> str:
    """Of questions as they are asked and judged."""
    return hashlib.sha256(json.dumps([asdict(each) for each in questions]).encode()).hexdigest()


def is_json(answer: str) -> bool:
    """Whether an answer is one JSON object or list (RFC 8259), with nothing around it but white space.

    A bare word, number or text is not counted, and neither is JSON within a Markdown code block: who parses an answer
    would fail on it. Keys that are given twice and nestings of more than 64 are refused as in sentei's own files.
    """
    if not answer.lstrip().startswith(("{", "[")):
        return False
    try:
        parse_json(answer, "The answer")
    except SenteiError:
        return False
    return True


def _split(kind: Kind, rest: str) -> tuple[str, list[tuple[str, str]]]:
    """The file, and the options with their values; a file's name may hold ``#``, and a value a comma."""
    known = _OPTIONS[kind]
    file, mark, written = rest.rpartition("#")
    if not mark or Path(rest).is_file():
        return rest, []
    given: list[tuple[str, str]] = []
    for part in written.split(","):
        option, equals, value = part.partition("=")
        if equals and option.strip() in known:
            given.append((option.strip(), value))
        elif given and not (equals and option.strip() in {each for names in _OPTIONS.values() for each in names}):
            given[-1] = (given[-1][0], f"{given[-1][1]},{part}")
        else:
            raise SenteiError(f"{kind} knows no option {part!r}.", f"After # it takes {', '.join(known)}.")
    return file, given


def _tokens(asked: str, kind: Kind, given: str | None) -> int:
    if given is None:
        return WRITTEN.get(kind, 0)
    if not (given.isascii() and given.isdigit() and len(given) < 6 and 1 <= int(given) <= MOST_TOKENS):
        raise SenteiError(f"{asked!r}: tokens must be a number from 1 to {MOST_TOKENS}.")
    return int(given)
