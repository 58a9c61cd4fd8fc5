"""Row 13: a lone surrogate in calibration text, questions or prompts ended in a traceback of the tokenizer."""

from pathlib import Path

import pytest

from serving.benchmark.workload import read_prompts
from tests.command_line import PLAIN, refused, sentei
from toolchain.errors import SenteiError
from toolchain.text.sources import read_documents

HALF = r"\ud83d"


def test_half_a_character_in_calibration_and_questions(pico_model: Path, text: Path, tmp_path: Path):
    calibration, questions = tmp_path / "c.jsonl", tmp_path / "q.jsonl"
    calibration.write_text('{"text": "fine"}\n{"text": "half ' + HALF + ' of one"}\n')
    questions.write_text('{"prompt": "a", "choices": ["b", "' + HALF + '"], "answer": 0}\n')
    prune = (
        "prune",
        pico_model,
        "-o",
        tmp_path / "out",
        "--sparsity",
        "0.25",
        "--align",
        "1",
        "--samples",
        "2",
        "--seq-len",
        "16",
        *PLAIN,
    )
    refused(sentei(*prune, "--calibration", calibration), f"{calibration} line 2", "half a character")
    refused(
        sentei(*prune, "--calibration", text, "--metric", f"accuracy:{questions}"),
        f"{questions} line 1", "half a character",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_half_a_character_in_prompts(pico_model: Path, tmp_path: Path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "' + HALF + '", "output_tokens": 3}')
    with pytest.raises(SenteiError, match=r"line 1 is not readable JSON .it holds half a character"):
        read_prompts(prompts, output_len=None, tokenizer=pico_model)


def test_a_whole_pair_is_a_character(tmp_path: Path):
    path = tmp_path / "text.jsonl"
    path.write_text(r'{"text": "\ud83c\udf33"}')
    assert list(read_documents(path)) == ["\N{DECIDUOUS TREE}"]


def test_text_that_is_no_unicode_in_parquet(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "text.parquet"
    broken = pa.array([b"\xed\xa0\xbd and more"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), path)
    with pytest.raises(SenteiError, match=r"text\.parquet"):
        list(read_documents(path))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(SenteiError, match="holds int64, not texts"):
        list(read_documents(path))
