"""Which passages of evaluation text a checkpoint was calibrated or healed with: on those it looks better than it is."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.evaluate.document import SeenPassage, TextOverlap
from toolchain.plan.plan import PLAN_FILE, ReadIn, load_plan
from toolchain.text.fingerprints import PASSAGE_TOKENS, find_passages
from toolchain.text.passages import number_passages
from toolchain.text.sources import Text
from toolchain.text.windows import TokenWindows

_MOST_LISTED = 10
_EXCERPT_TOKENS = 40


def text_hashes(directory: Path) -> Mapping[ReadIn, NDArray[np.uint64]]:
    """What a checkpoint's plan knows of the text it was made with, by what the text was for; nothing without a plan."""
    if not (directory / PLAN_FILE).is_file():
        return {}
    try:
        return load_plan(directory).text_hashes
    except SenteiError:
        # The plan may be under a person's hands, or lie without its scores in an export; to measure takes no plan.
        return {}


def find_overlap(
    text: Text,
    windows: TokenWindows,
    tokenizer: PreTrainedTokenizerBase,
    seen_in: ReadIn,
    hashes: NDArray[np.uint64],
) -> TextOverlap | None:
    """Looks for passages that were read before; ``None`` where a text is too short to tell.

    Args:
        text: What the windows are from.
        windows: What is evaluated.
        tokenizer: The one they were made with.
        seen_in: ``calibration`` or ``healing``.
        hashes: Of the text read there.
    """
    overlap = find_passages(windows.text_ids.flatten().numpy(), hashes)
    num_looked_at = int(overlap.looked_at.sum())
    if not num_looked_at:
        return None
    if not overlap.found.any():
        return TextOverlap(text=windows.source, seen_in=seen_in, share=0.0)
    unit, numbers = number_passages(text, tokenizer, windows.text_ids)
    of_passage = numbers.flatten()[: -PASSAGE_TOKENS + 1].numpy()
    size = int(numbers.max()) + 1
    looked_at, found = (np.bincount(of_passage[each], minlength=size) for each in (overlap.looked_at, overlap.found))
    seen = sorted(np.flatnonzero(found).tolist(), key=lambda number: (-found[number] / looked_at[number], number))
    return TextOverlap(
        text=windows.source,
        seen_in=seen_in,
        share=float(overlap.found.sum()) / num_looked_at,
        unit=unit,
        num_passages=len(torch.unique(numbers)),
        num_seen=len(seen),
        passages=[
            SeenPassage(
                number=number,
                share=float(found[number] / looked_at[number]),
                excerpt=tokenizer.decode(windows.text_ids[numbers == number][:_EXCERPT_TOKENS]).strip(),
            )
            for number in seen[:_MOST_LISTED]
        ],
    )
