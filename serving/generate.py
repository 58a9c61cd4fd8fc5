"""Text from a checkpoint or an ONNX export, piece by piece, to try a model by hand."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from serving.chat_template import ChatTemplate
from serving.onnx_files import is_onnx_export
from serving.sampling import GREEDY, Sampling
from toolchain.errors import SenteiError
from toolchain.modeling import load_model, load_tokenizer

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

    Raises:
        SenteiError: No such model, an empty prompt, or no chat template, or one that takes too much.
    """
    tokenizer = load_tokenizer(directory)
    ids = _prompt_ids(tokenizer, prompt, chat=chat)
    if is_onnx_export(directory):
        from serving.onnx_genai import stream_tokens

        return _decode(tokenizer, stream_tokens(directory, ids, max_new_tokens, sampling))
    model = load_model(directory, dtype=dtype, device=device)
    return _from_transformers(model, tokenizer, ids, max_new_tokens, sampling)


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
        "do_sample": sampling.temperature > 0,
        "streamer": streamer,
    }
    if sampling.temperature > 0:
        arguments |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
    thread = Thread(target=model.generate, args=(inputs,), kwargs=arguments, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
