"""A kilobyte of tokenizer.json must not cost gigabytes."""

import json
import resource
import time

import pytest

from tests.readers.files import write_tokenizer
from toolchain.errors import SenteiError
from toolchain.model.loading import load_tokenizer


def change(directory, change_it, name="tokenizer.json"):
    path = directory / name
    found = json.loads(path.read_text())
    change_it(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_an_id_that_no_vocabulary_reaches_is_refused_at_once(tmp_path, place):
    write_tokenizer(tmp_path)

    def enlarge(found):
        token = found["added_tokens"][1]
        if place == "vocab":
            found["model"]["vocab"][token["content"]] = 2_000_000_000
        else:
            token["id"] = 2_000_000_000

    change(tmp_path, enlarge)
    began = time.process_time()
    with pytest.raises(SenteiError, match="gives a token the id 2000000000"):
        load_tokenizer(tmp_path)
    assert time.process_time() - began < 1


def test_a_list_of_tokens_is_looked_at_too(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 2_000_000_000}))
    with pytest.raises(SenteiError, match=r"vocab\.json gives a token the id"):
        load_tokenizer(tmp_path)


def test_large_numbers_elsewhere_are_left_alone(tmp_path):
    write_tokenizer(tmp_path)
    change(tmp_path, lambda found: found.update(truncation={
        "direction": "Right", "max_length": 2_000_000_000, "strategy": "LongestFirst", "stride": 0,
    }))  # fmt: skip
    assert load_tokenizer(tmp_path)("a").input_ids


def test_what_would_fill_the_memory_is_not_parsed_for_its_ids(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": 123456789, "b": [' + "[]," * 20_000_000 + "0]}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SenteiError, match="more parts than any model's tokenizer"):
        load_tokenizer(tmp_path)
    # 28 times the file otherwise; in KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000
