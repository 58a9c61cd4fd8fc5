"""Metrics of answers that a model writes itself: refusal rate, and whether they are JSON."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.metrics.model_metric import ModelMetric
from toolchain.metrics.question_metrics import ANSWERS_AT_A_TIME, CountingMetric, Outcome, QuestionMetric
from toolchain.metrics.questions import OpenQuestion
from toolchain.model.loading import CACHE_ARGUMENT, end_tokens
from toolchain.model.not_finite import not_finite
from toolchain.text.chats import as_chats

# Of all texts that are written together: their KV cache stays small where prompts are long.
_MOST_TOKENS = 16384


class WrittenMetric(CountingMetric, ModelMetric):
    """Lets the model write an answer to every question, greedily, so that the same model writes the same again."""

    def __init__(
        self,
        questions: Sequence[OpenQuestion],
        tokenizer: PreTrainedTokenizerBase,
        *,
        asked: QuestionMetric,
        longest: int,
        bos: int | None = None,
        chat_template: bool = False,
    ) -> None:
        """Tokenises.

        Args:
            questions: What is asked.
            tokenizer: The model's own.
            asked: What is counted, and how long an answer may be.
            longest: Tokens that the model reads and writes at most.
            bos: What a prompt begins with; see :func:`toolchain.model.loading.bos_of`.
            chat_template: A prompt is a user's turn in the model's chat template.

        Raises:
            SenteiError: A prompt leaves no room for an answer, or there is no chat template.
        """
        super().__init__(asked, questions, chat_template=chat_template)
        self._questions, self._tokenizer = questions, tokenizer
        self.prompts = encode_prompts(
            questions, tokenizer, asked=asked, longest=longest, bos=bos, chat_template=chat_template
        )

    def __call__(self, model: PreTrainedModel) -> float:
        """See :class:`ModelMetric`.

        Raises:
            SenteiError: The model's logits are NaN or Inf.
        """
        return self._asked.value([outcome for outcome, _ in self.answers(model)])

    def answers(
        self, model: PreTrainedModel, on_answer: Callable[[], None] = lambda: None
    ) -> list[tuple[Outcome, str]]:
        """What the model writes, question by question, and what that counts as.

        Args:
            model: Pruned or not.
            on_answer: Called once an answer, for progress.

        Raises:
            SenteiError: The model's logits are NaN or Inf.
        """
        found: dict[int, str] = {}
        for number, tokens in write_greedily(model, self.prompts, self._asked.tokens):
            found[number] = self._tokenizer.decode(tokens, skip_special_tokens=True)
            on_answer()
        texts = [found[number] for number in range(len(self._questions))]
        return [
            (self._asked.of_answer(question, text), text) for question, text in zip(self._questions, texts, strict=True)
        ]


def encode_prompts(
    questions: Sequence[OpenQuestion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    asked: QuestionMetric,
    longest: int,
    bos: int | None = None,
    chat_template: bool = False,
) -> list[list[int]]:
    """The tokens of every prompt, in order; see :class:`WrittenMetric`.

    Raises:
        SenteiError: A prompt leaves no room for an answer, or there is no chat template.
    """
    prompts = [each.prompt for each in questions]
    prompts = as_chats(tokenizer, prompts) if chat_template else [each.rstrip() for each in prompts]
    encoded: list[list[int]] = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in prompts]
    # A chat template writes it itself.
    if bos is not None and not chat_template:
        encoded = [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]
    for number, ids in enumerate(encoded, 1):
        if not ids or len(ids) + asked.tokens > longest:
            raise SenteiError(
                f"{asked.file.name} question {number}: its prompt has {len(ids):,} tokens and its answer up to "
                f"{asked.tokens:,}, and the model reads {longest:,}.",
                "Shorten it, or ask for shorter answers: #tokens=N.",
            )
    return encoded


@torch.inference_mode()
def write_greedily(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Continues prompts greedily, up to an end-of-sequence token, which is left out.

    Not Transformers' own generate, which would take over a checkpoint's penalties and its cached settings.

    Args:
        model: Pruned or not.
        prompts: Token ids; none of them empty.
        max_new_tokens: For each.

    Yields:
        The number of a prompt and its continuation; prompts of about one length together, the shortest first.

    Raises:
        SenteiError: The model's logits are NaN or Inf.
    """
    ends = end_tokens(model.generation_config)
    for some in _together([len(each) + max_new_tokens for each in prompts]):
        rows = _continue([prompts[number] for number in some], model, max_new_tokens, ends)
        yield from zip(some, (until_end(row, ends) for row in rows), strict=True)


def _together(lengths: Sequence[int]) -> list[list[int]]:
    """Which texts are written together, the shortest first."""
    batches: list[list[int]] = [[]]
    for number in sorted(range(len(lengths)), key=lambda number: (lengths[number], number)):
        count = len(batches[-1]) + 1
        if count > ANSWERS_AT_A_TIME or (count > 1 and count * lengths[number] > _MOST_TOKENS):
            batches.append([])
        batches[-1].append(number)
    return batches


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first end."""
    return list(tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))])


def _continue(
    prompts: Sequence[Sequence[int]], model: PreTrainedModel, max_new_tokens: int, ends: Sequence[int]
) -> list[list[int]]:
    longest, device = max(map(len, prompts)), model.device
    # What is padded stands on the left, so that all answers begin at the same place, and nothing attends to it.
    step = torch.tensor([[0] * (longest - len(each)) + list(each) for each in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    end_ids, written, cache = torch.tensor(ends, dtype=torch.int64, device=device), list[torch.Tensor](), None
    while len(written) < max_new_tokens and not bool(ended.all()):
        out = model(
            step, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{CACHE_ARGUMENT: cache},
        )  # fmt: skip
        logits = out.logits[:, -1].to(device)
        if not bool(torch.isfinite(logits).all()):
            raise not_finite("What the model writes is NaN or Inf", model, model.dtype)
        cache, tokens = out[CACHE_ARGUMENT], logits.argmax(-1)
        written.append(tokens)
        ended |= torch.isin(tokens, end_ids)
        step, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(prompts), 1)], -1)
        positions = positions[:, -1:] + 1
    return torch.stack(written, -1).tolist()
