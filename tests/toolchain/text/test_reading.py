"""Of a text no more is read and tokenised than its windows need, and its tokens are those of the whole text."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from toolchain.text import windows
from toolchain.text.sources import read_documents, read_joined
from toolchain.text.windows import load_windows, tokenize

# What a cut can go through: words, long ones too, Japanese without spaces, runs, characters of several, special tokens.
PARTS = [
    "The gardener", " prunes", " trees", " in", " winter", "庭師", "は", "冬に", "木を", "剪定する", "。", "「はい」",
    "\n", "\n\n", "    ", "\t", "a" * 40, "=" * 30, "12345", "e\u0301", "\N{DECIDUOUS TREE}", "<|end|>", "<|", ", ",
]  # fmt: skip


def text_of(draw: random.Random, num_parts: int) -> str:
    return "".join(draw.choices(PARTS, k=num_parts))


def by_words() -> Tokenizer:
    """As Llama 3's and Qwen's: bytes, merged within words."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))


def without_words() -> Tokenizer:
    """As Llama 2's and Gemma's: the whole text is one word, and merges may reach across all of it."""
    tokenizer = Tokenizer(BPE(unk_token="?", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=700, special_tokens=["?"], show_progress=False))


def by_likelihood() -> Tokenizer:
    """As T5's: of all ways to divide a text the likeliest."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["?"], unk_token="?", show_progress=False)
    return trained(tokenizer, trainer)


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    draw = random.Random(0)
    tokenizer.train_from_iterator([text_of(draw, 40) for _ in range(100)], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[by_words, without_words, by_likelihood])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=request.param())
    made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return made


def check(tokenizer: PreTrainedTokenizerFast, text: str, needed: int, place: int) -> None:
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = tokenize(iter([text[:place], text[place:]]), tokenizer, needed)
    assert ids[:needed] == whole[:needed]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(0, 2000), st.integers(0, 9000))
def test_tokens_are_those_of_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, seed: int, needed: int, num_parts: int, place: int
):
    check(tokenizer, text_of(random.Random(seed), num_parts), needed, place)


def test_a_cut_changes_tokens_before_it(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    """Otherwise the test above would prove nothing."""
    monkeypatch.setattr(windows, "_CUT_TOKENS", 0)
    monkeypatch.setattr(windows, "_FIRST_GUESS_CHARS_PER_TOKEN", 1)
    with pytest.raises(AssertionError):
        for seed in range(30):
            for needed in range(1, 60, 7):
                check(tokenizer, text_of(random.Random(seed), 400), needed, 0)


def test_of_a_large_file_no_more_is_read_than_is_needed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    text, file, lengths = text_of(random.Random(1), 2000), tmp_path / "large.txt", []
    # Its end, five megabytes on, is not UTF-8, and nobody comes there.
    file.write_bytes((text * (5_000_000 // len(text.encode()))).encode() + b"\xff")

    def counting(given: str, **options: bool) -> Any:
        lengths.append(len(given))
        return tokenizer(given, **options)

    found = load_windows(file, counting, num_samples=2, seq_len=16)  # type: ignore[arg-type]
    assert max(lengths) < 10_000
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert found.ids.flatten().tolist() == whole[:32]


def test_pieces_are_the_documents_joined_by_two_newlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("toolchain.text.sources._PIECE_CHARS", 3)
    files = {"a.txt": "", "b.txt": "one\r\ntwo", "c.txt": "", "d.jsonl": '{"text": "three"}\n' * 2}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    assert list(read_documents(tmp_path)) == ["", "one\ntwo", "", "three", "three"]
    pieces = list(read_joined(tmp_path))
    assert "".join(map(str, pieces)) == "one\ntwo\n\n\n\nthree\n\nthree"
    assert "one" in pieces
