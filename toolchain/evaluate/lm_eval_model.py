"""lm-eval's wrapper around a loaded model, which reads as the model is served. Imports lm-eval."""

import io
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.evaluate.task_requests import BatchSize
from toolchain.text.chat_template import ANSWER_BEGINS, LAST_GOES_ON, ChatTemplate

_BATCH_SIZE = 16


def pick_batch_size(asked: BatchSize | None, device: torch.device) -> BatchSize:
    """How many requests a model reads at a time.

    Args:
        asked: A number; ``auto``, for which lm-eval tries what fits; or ``None`` for sentei's default.
        device: Where the model is. What does not fit into a CPU's memory ends the process, so there ``auto`` tries
            nothing and is the default.
    """
    return _BATCH_SIZE if asked is None or (asked == "auto" and device.type != "cuda") else asked


class ServedHFLM(HFLM):
    """Reads as the model is served, counts what it cuts, and draws no bars, which no setting turns off.

    Attributes:
        num_cut: Prompts that were longer than the model's context and lost their beginning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bos: int | None,
        template: ChatTemplate | None,
        on_request: Callable[[], None],
        batch_size: BatchSize,
    ) -> None:
        """See :func:`toolchain.evaluate.lm_eval_tasks.run_task`; without ``template``, prompts go in as they are."""
        self._bos, self._template, self.num_cut = bos, template, 0
        self._longest_choice: int | None = None
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            # Half precision would make ties of close choices.
            softmax_dtype="float32",
        )
        self.set_cache_hook(_RequestCounter(on_request))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Without a bar, and without what lm-eval prints of batch sizes to where results go."""
        with redirect_stdout(io.StringIO()):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Likewise."""
        with redirect_stdout(io.StringIO()):
            return super().generate_until(requests, disable_tqdm=True)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A prompt's tokens as a server makes them, without what the tokenizer would add at the end."""
        ids = super().tok_encode(string, add_special_tokens=False)
        if add_special_tokens is False or self._template or self._bos is None:
            return ids
        # A prompt may have been written with it.
        return ids if ids[:1] == [self._bos] else [self._bos, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not self._template or not context.endswith("\n"):
            asked, choice = super()._encode_pair(context, continuation)
            if choice:
                return asked, choice
        # lm-eval would count the line break, with which the template ends, to each choice; and of a choice that merges
        # with the end of its prompt into one token it would leave nothing.
        whole, num_asked = self.tok_encode(context + continuation), len(self.tok_encode(context))
        num_asked = min(num_asked, len(whole) - 1)
        return whole[:num_asked] or [self.prefix_token_id], whole[num_asked:]

    def tok_batch_encode(
        self, strings: Any, padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> Any:
        """Prompts for generation, padded and cut on the left: ids and mask, int64 ``[num_prompts, longest]``."""
        assert padding_side == "left"
        rows = [self._cut(self.tok_encode(each), left_truncate_len) for each in strings]
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        pad: Any = self.tokenizer.pad_token_id
        ids = [[pad] * num + row for num, row in zip(padding, rows, strict=True)]
        return torch.tensor(ids), torch.tensor([[0] * num + [1] * (longest - num) for num in padding])

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
        # The last token is predicted, not read.
        longest = self.max_length + 1
        if too_long := [asked for asked, _, choice in requests if len(choice) >= longest]:
            raise SenteiError(
                f"A choice is longer than the model's context of {self.max_length} tokens: {too_long[0][1]!r}.",
                "Leave that question out.",
            )
        within = [(asked, self._cut(prompt, longest - len(choice)), choice) for asked, prompt, choice in requests]
        answer = partial(super()._loglikelihood_tokens, disable_tqdm=disable_tqdm, override_bs=override_bs)
        if self.batch_size == "auto":
            # What fits is tried with all logits.
            return answer(within)
        by_length = defaultdict(list)
        for place, (_, _, choice) in enumerate(within):
            by_length[len(choice).bit_length()].append(place)
        answers: list[Any] = [None] * len(within)
        for places in by_length.values():
            self._longest_choice = max(len(within[place][2]) for place in places)
            for place, found in zip(places, answer([within[place] for place in places]), strict=True):
                answers[place] = found
        return answers

    def _model_call(self, inps: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Logits of the last tokens, int64 ``[num_rows, num_tokens]`` in, ``[num_rows, num_kept, vocab_size]`` out.

        lm-eval finds a choice by how far it is from the end, and what comes before it would be most of the memory.
        """
        num_kept = inps.shape[1]
        if self._longest_choice is not None:
            # Rows are filled up with zeros; a last token that is 0 itself is counted too, which keeps more than needed.
            num_filled = int(inps.flip(1).eq(0).cumprod(1).sum(1).max())
            num_kept = min(num_kept, num_filled + self._longest_choice)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=num_kept).logits

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """A task's turns as text.

        Raises:
            SenteiError: The template refuses them.
        """
        assert self._template is not None
        ending = ANSWER_BEGINS if add_generation_prompt else LAST_GOES_ON
        try:
            return self._template.render(chat_history, ending=ending)
        except SenteiError:
            # Some templates know no system's turn, where lm-eval has a task's description; it leaves it out too.
            others = [each for each in chat_history if each["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return self._template.render(others, ending=ending)

    def _cut(self, prompt: list[int], length: int | None) -> list[int]:
        """A prompt without its beginning, where it is too long, but with BOS."""
        if length is None or (excess := len(prompt) - length) <= 0:
            return prompt
        self.num_cut += 1
        num_kept = min(length, int(self._bos is not None and prompt[:1] == [self._bos]))
        return [*prompt[:num_kept], *prompt[num_kept + excess :]]


class _RequestCounter:
    """Stands where lm-eval would cache responses: is told of each one."""

    def __init__(self, on_request: Callable[[], None]) -> None:
        self._on_request = on_request

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._on_request()
