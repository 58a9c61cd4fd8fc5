"""Text from a checkpoint or an ONNX export, piece by piece, to try a model by hand."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from serving.engines.sampling import GREEDY, NOT_A_NUMBER, Sampling
from serving.onnx_export.files import is_onnx_export
from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.errors import SenteiError
from toolchain.model.context_length import check_context, context_length
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stream_text(
    directory: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    chat: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[str]:
    """Continues a prompt until the end-of-sequence token or ``max_new_tokens``.

    Args:
        directory: A checkpoint (run in Transformers) or an ONNX export (run in onnxruntime-genai).
        prompt: Text.
        max_new_tokens: At most this many.
        sampling: How tokens are picked.
        chat: Whether to put the prompt into the chat template.
        dtype: For checkpoints, what is computed in.
        device: For checkpoints, where.
        note: Told where the model reads so much only by its rope scaling.

    Raises:
        SenteiError: No such model, an empty prompt, one that the model's context has no room for, or a chat template
            that is missing or takes too much.
    """
    tokenizer = load_tokenizer(directory)
    ids = _prompt_ids(tokenizer, prompt, chat=chat)
    if is_onnx_export(directory):
        from serving.engines.genai import stream_tokens

        return _decode(tokenizer, stream_tokens(directory, ids, max_new_tokens, sampling))
    checkpoint = open_checkpoint(directory)
    _check_room(checkpoint, len(ids), max_new_tokens, note)
    model = load_model(checkpoint, dtype=dtype, device=device)
    return _from_transformers(model, tokenizer, ids, max_new_tokens, sampling)


def _check_room(
    checkpoint: Checkpoint, num_prompt_tokens: int, max_new_tokens: int, note: Callable[[str], None]
) -> None:
    """Checks that prompt and answer fit into the model's context, before its weights are read."""
    left = context_length(checkpoint.config).extended - num_prompt_tokens
    check_context(
        checkpoint.directory,
        checkpoint.config,
        num_prompt_tokens + max_new_tokens,
        asked=f"The prompt has {num_prompt_tokens} tokens, and --max-new-tokens is {max_new_tokens}",
        hint=f"Give at most --max-new-tokens {left}." if left > 0 else "Shorten the prompt.",
        note=note,
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> list[int]:
    if chat:
        if not tokenizer.chat_template:
            raise SenteiError("This model has no chat template.", "Leave --chat out.")
        messages = [{"role": "user", "content": prompt}]
        with ChatTemplate(tokenizer) as template:
            text = template.render(messages)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise SenteiError("The prompt is empty.")
    return ids


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int]) -> Iterator[str]:
    """Decodes a stream of tokens; a piece is held back while it ends within a character."""
    seen: list[int] = []
    printed = ""
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(printed) :]
            printed = text


def _refuse_nan(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that changes nothing; of NaN Transformers would take the first token, without a word."""
    if scores.isnan().any():
        raise SenteiError(NOT_A_NUMBER)
    return scores


def _from_transformers(
    model: "PreTrainedModel",
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[str]:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = torch.tensor([list(ids)], device=model.device)
    arguments = {
        "attention_mask": torch.ones_like(inputs),
        "max_new_tokens": max_new_tokens,
        "do_sample": sampling.draws,
        "logits_processor": [_refuse_nan],
        "streamer": streamer,
    }
    if sampling.draws:
        arguments |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
    failed: list[BaseException] = []

    def generate() -> None:
        try:
            model.generate(inputs, **arguments)
        except BaseException as error:
            # Otherwise the reader of the stream would wait for ever.
            failed.append(error)
            streamer.text_queue.put(streamer.stop_signal)

    thread = Thread(target=generate, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]
