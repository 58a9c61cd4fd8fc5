"""Two models are compared token by token, so they must have the same tokens."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.families import make_family_pico
from toolchain.errors import SenteiError
from toolchain.evaluate.run import EvaluationSettings, evaluate
from toolchain.parts_cache import Parts

WORDS = {f"w{number}": number for number in range(96)}


def model(directory: Path, words: dict[str, int], **overrides: object) -> Path:
    make_family_pico(directory, "llama", "grouped", **overrides)
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("words", "overrides"), [(WORDS | {"w1": 2, "w2": 1}, {}), (WORDS, {"vocab_size": 97})], ids=["tokens", "size"]
)
def test_an_original_with_other_tokens_is_refused(tmp_path: Path, words: dict[str, int], overrides: dict):
    ours, other = model(tmp_path / "ours", WORDS), model(tmp_path / "other", words, **overrides)
    settings = EvaluationSettings(
        texts=(tmp_path / "text.txt",), num_windows=1, seq_len=8, device="cpu", dtype=torch.float32
    )
    with pytest.raises(SenteiError, match="another tokenizer or vocabulary"):
        evaluate(ours, other, settings, Parts(None))
