"""A model for the tests of pruning whose tokens are words."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.families import make_family_pico

SEQ_LEN, NUM_SAMPLES = 32, 16


@pytest.fixture(scope="module")
def worded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokens are words, with a text of just as many as are needed."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_family_pico(directory, "llama", "grouped")
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    draw = random.Random(0)
    (directory / "text.txt").write_text(
        " ".join(f"w{draw.randrange(3, 96)}" for _ in range((NUM_SAMPLES + 2) * SEQ_LEN))
    )
    return directory
