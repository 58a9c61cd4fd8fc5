"""A text that was read before is known again, however it is cut, and no other."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.text.fingerprints import MOST_HASHES, PASSAGE_TOKENS, _hashes, find_passages, hash_passages, merge_hashes


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50000, shape)


@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(PASSAGE_TOKENS, 300))
@settings(max_examples=30, deadline=None)
def test_a_shared_document_is_found_wherever_it_lies(seed: int, before: int, length: int):
    document = random_tokens(seed, length)
    read = np.concatenate([random_tokens(seed + 1, before), document, random_tokens(seed + 2, 100)])
    other = np.concatenate([random_tokens(seed + 3, 77), document, random_tokens(seed + 4, 50)])
    found = find_passages(other, hash_passages(read)).found
    assert np.flatnonzero(found).tolist() == list(range(77, 77 + length - PASSAGE_TOKENS + 1))


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_texts_that_share_less_than_a_passage_have_nothing_in_common(seed: int):
    one, other = random_tokens(seed, 2048), random_tokens(seed + 1, 2048)
    other[100 : 100 + PASSAGE_TOKENS - 1] = one[7 : 7 + PASSAGE_TOKENS - 1]
    overlap = find_passages(other, hash_passages(one))
    assert not overlap.found.any()
    assert overlap.looked_at.all()


def test_a_long_text_is_sampled_and_its_share_estimated():
    read = random_tokens(0, 131072)
    hashes = hash_passages(read)
    assert len(hashes) == MOST_HASHES
    assert hashes.nbytes == 128 * 1024
    # Documents of 600 tokens, half of them read.
    documents = random_tokens(1, 40, 600)
    documents[::2] = read[333:].reshape(-1)[: 20 * 600].reshape(20, 600)
    overlap = find_passages(documents.flatten(), hashes)
    places = np.arange(len(overlap.found)) // 600
    assert set(places[overlap.found]) == set(range(0, 40, 2))
    assert abs(overlap.found.sum() / overlap.looked_at.sum() - 0.5) < 0.05


@given(st.integers(0, 2**32), st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=10, deadline=None)
def test_hashes_of_two_texts_are_those_of_both_together(seed: int, first: int, second: int):
    one, other = random_tokens(seed, 1024 * first), random_tokens(seed + 1, 1024 * second)
    both = np.union1d(_hashes(one), _hashes(other))[:MOST_HASHES]
    np.testing.assert_array_equal(merge_hashes(hash_passages(one), hash_passages(other)), both)


def test_a_text_shorter_than_a_passage_says_nothing():
    assert hash_passages(random_tokens(0, PASSAGE_TOKENS - 1)).size == 0
    assert find_passages(random_tokens(0, 8), hash_passages(random_tokens(0, 64))).found.shape == (0,)


def test_a_system_prompt_that_all_chats_share_is_a_small_part_of_them():
    """Calibration and evaluation from one log of chats: other chats, and the same instructions in front of each."""
    prompt = random_tokens(0, 100)
    chats = [np.concatenate([prompt, random_tokens(seed, 400)]) for seed in range(1, 101)]
    read, other = np.concatenate(chats[:50]), np.concatenate(chats[50:])
    overlap = find_passages(other, hash_passages(read))
    assert 0 < overlap.found.sum() / overlap.looked_at.sum() < 0.01
    # One chat of fifty that was read is known again.
    overlap = find_passages(np.concatenate([*chats[50:99], chats[0]]), hash_passages(read))
    assert 0.015 < overlap.found.sum() / overlap.looked_at.sum() < 0.025
