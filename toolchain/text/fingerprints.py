"""Whether a text was read before, without keeping it: hashes of its passages of 32 tokens, of a bounded number.

A passage here is any 32 tokens in a row (a shingle: Broder, "On the resemblance and containment of documents", 1997):
it does not matter where windows are cut. The smallest hashes are kept (the same paper's sketch), which are a random
sample of the passages, the same of any text that holds them. GPT-3's check for contamination looks at 13 words (Brown
et al., arXiv 2005.14165, appendix C), deduplication at 50 tokens (Lee et al., arXiv 2107.06499); 13 tokens are often
shared by chance. No torch here.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PASSAGE_TOKENS = 32
# 128 KiB. All passages of 16 thousand tokens, one in four of 32 windows of 2048.
MOST_HASHES = 16384


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What is known again in a text, by the token where a passage begins.

    Attributes:
        looked_at: bool ``[num_tokens - 31]``: passages that would be in the sample, had they been read; each where it
            comes first, since what all chats of a text share, such as a system prompt, is a small part of what it says.
        found: Of the same shape: those that were.
    """

    looked_at: NDArray[np.bool_]
    found: NDArray[np.bool_]


def hash_passages(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The smallest different hashes of all passages of a text, ascending, :data:`MOST_HASHES` at most.

    Args:
        ids: Of its tokens, ``[num_tokens]``; fewer than a passage's have none.
    """
    return np.unique(_hashes(ids))[:MOST_HASHES]


def merge_hashes(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What :func:`hash_passages` gives for both texts together."""
    return np.union1d(one, other)[:MOST_HASHES]


def find_passages(ids: NDArray[np.int64], hashes: NDArray[np.uint64]) -> Overlap:
    """Looks for a text's passages in another.

    Args:
        ids: Of the other's tokens, by the same tokenizer, ``[num_tokens]``.
        hashes: From :func:`hash_passages`.
    """
    own = _hashes(ids)
    highest = hashes[-1] if len(hashes) == MOST_HASHES else np.iinfo(np.uint64).max
    comes_first = np.zeros(len(own), dtype=np.bool_)
    comes_first[np.unique(own, return_index=True)[1]] = True
    looked_at = comes_first & (own <= highest)
    return Overlap(looked_at=looked_at, found=looked_at & np.isin(own, hashes))


def _hashes(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One hash a passage, ``[num_tokens - 31]``: a polynomial of mixed token ids, mixed again."""
    count = max(0, len(ids) - PASSAGE_TOKENS + 1)
    tokens = _mix(ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(PASSAGE_TOKENS):
        total = total * np.uint64(0xD1342543DE82EF95) + tokens[offset : offset + count]
    return _mix(total)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a permutation of 64-bit numbers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
