"""A text that was read before is known again, however it is cut, and no other."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.passage_hashes import MOST_HASHES, PASSAGE_TOKENS, find_passages, hash_passages, merge_hashes


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50000, shape)


@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(PASSAGE_TOKENS, 300))
@settings(max_examples=30)
def test_a_shared_document_is_found_wherever_it_lies(seed: int, before: int, length: int):
    document = random_tokens(seed, length)
    read = np.concatenate([random_tokens(seed + 1, before), document, random_tokens(seed + 2, 100)])[None]
    other = np.concatenate([random_tokens(seed + 3, 77), document, random_tokens(seed + 4, 50)])[None]
    found = find_passages(other, hash_passages(read)).found[0]
    assert np.flatnonzero(found).tolist() == list(range(77, 77 + length - PASSAGE_TOKENS + 1))


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_texts_that_share_less_than_a_passage_have_nothing_in_common(seed: int):
    one, other = random_tokens(seed, 4, 512), random_tokens(seed + 1, 4, 512)
    other[2, 100 : 100 + PASSAGE_TOKENS - 1] = one[1, 7 : 7 + PASSAGE_TOKENS - 1]
    overlap = find_passages(other, hash_passages(one))
    assert not overlap.found.any()
    assert overlap.looked_at.all()


def test_a_long_text_is_sampled_and_its_share_estimated():
    read = random_tokens(0, 64, 2048)
    hashes = hash_passages(read)
    assert len(hashes) == MOST_HASHES
    assert hashes.nbytes == 128 * 1024
    # Documents of 600 tokens, half of them read, but from the middle of windows.
    documents = random_tokens(1, 40, 600)
    documents[::2] = read[:20, 333:933]
    overlap = find_passages(documents, hashes)
    assert overlap.found[::2].any(1).all()
    assert not overlap.found[1::2].any()
    assert abs(overlap.found.sum() / overlap.looked_at.sum() - 0.5) < 0.05


@given(st.integers(0, 2**32), st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=10)
def test_hashes_of_two_texts_are_those_of_both_together(seed: int, first: int, second: int):
    one, other = random_tokens(seed, first, 1024), random_tokens(seed + 1, second, 1024)
    together = hash_passages(np.concatenate([one, other]))
    np.testing.assert_array_equal(merge_hashes(hash_passages(one), hash_passages(other)), together)


def test_windows_shorter_than_a_passage_say_nothing():
    assert hash_passages(random_tokens(0, 3, PASSAGE_TOKENS - 1)).size == 0
    assert find_passages(random_tokens(0, 3, 8), hash_passages(random_tokens(0, 3, 64))).found.shape == (3, 0)
