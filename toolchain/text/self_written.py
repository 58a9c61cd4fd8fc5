"""Calibration text that a model writes itself, where no other text may be used.

Self-calibration (Williams, Chrysostomou and Aletras, NAACL 2025, arXiv 2410.17170): documents are drawn from the
model's own distribution, beginning with nothing but the token that begins its documents. Here at one temperature
throughout.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.model.context_length import context_length
from toolchain.model.loading import bos_of, end_tokens, load_model, load_tokenizer
from toolchain.parts_cache import Parts
from toolchain.progress import Progress, no_progress


@dataclass(frozen=True, kw_only=True)
class WritingSettings:
    """What is to be written.

    Attributes:
        num_tokens: In all, at least.
        max_new_tokens: Of a document; most end earlier.
        batch_size: Documents written together.
        temperature: 1 draws from the model's own distribution.
        seed: The same seed and batch size write the same text.
        device: Computed on.
        dtype: Computed in.
    """

    num_tokens: int
    max_new_tokens: int
    batch_size: int
    temperature: float
    seed: int
    device: str
    dtype: torch.dtype


def write_documents(
    directory: Path, settings: WritingSettings, parts: Parts, *, progress: Progress = no_progress
) -> list[str]:
    """Lets a model write documents, batch after batch, until they have enough tokens.

    Args:
        directory: A checkpoint; the original, whose distribution calibration is to stand for.
        settings: See :class:`WritingSettings`.
        parts: Keeps finished batches.
        progress: Told of every hundredth of the tokens.

    Raises:
        SenteiError: Bad input, or the model writes nothing.
    """
    for name, value in (
        ("--tokens", settings.num_tokens),
        ("--max-new-tokens", settings.max_new_tokens),
        ("--batch-size", settings.batch_size),
        ("--temperature", settings.temperature),
    ):
        if not 0 < value < math.inf:
            raise SenteiError(f"{name} {value:g} makes no sense.", "Give a number above 0.")
    checkpoint, tokenizer = open_checkpoint(directory), load_tokenizer(directory)
    longest = context_length(checkpoint.config).extended
    if settings.max_new_tokens >= longest:
        raise SenteiError(
            f"--max-new-tokens {settings.max_new_tokens} is too long: the model reads {longest} tokens in all.",
            f"Give at most {longest - 1}.",
        )
    begins = (bos_of(checkpoint.family, tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in begins if token is not None), None)
    if start is None:
        raise SenteiError(f"{directory}: the tokenizer has no token that begins or ends a text, so nothing can begin.")
    # How much is wanted is left out, so that more of the same goes on where less ended.
    asked = {name: str(value) for name, value in asdict(settings).items() if name != "num_tokens"}
    identity = {**asked, "weights_sha256": checkpoint.fingerprint, "transformers": transformers.__version__}
    documents: list[str] = []
    num_tokens = num_batches = 0
    model: PreTrainedModel | None = None

    def write() -> dict[str, Any]:
        nonlocal model
        model = model or load_model(checkpoint, dtype=settings.dtype, device=settings.device)
        return {"documents": _write_batch(model, tokenizer, start, settings, num_batches)}

    with progress("Writing, % of the tokens", 100) as advance:
        while num_tokens < settings.num_tokens:
            batch = parts.get(f"batch-{num_batches:05}", {**identity, "batch": num_batches}, write)["documents"]
            if not batch:
                raise SenteiError(f"{directory} wrote only empty documents.", "Raise --temperature, or bring text.")
            before = 100 * num_tokens // settings.num_tokens
            num_tokens += sum(len(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in batch)
            for _ in range(before, min(100, 100 * num_tokens // settings.num_tokens)):
                advance()
            documents += batch
            num_batches += 1
    return documents


@torch.inference_mode()
def _write_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: int, settings: WritingSettings, batch: int
) -> list[str]:
    # Each batch has a seed of its own, so that one that goes on after an interruption is what it would have been.
    torch.manual_seed((settings.seed * 1_000_003 + batch) % 2**63)
    inputs = torch.full((settings.batch_size, 1), start, device=model.device)
    ends = end_tokens(model.generation_config)
    written = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=settings.max_new_tokens,
        do_sample=True,
        temperature=settings.temperature,
        # A checkpoint may carry settings for chatting, which would cut the tail of the distribution off.
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        pad_token_id=ends[0] if ends else start,
    )
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [text for each in texts if (text := each.strip())]
