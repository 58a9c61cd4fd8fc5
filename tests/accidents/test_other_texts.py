"""Texts as people have them that were refused, and bombs of the same size that must stay refused."""

import json
from pathlib import Path

import pytest

from toolchain.errors import SenteiError
from toolchain.json_files import MAX_BYTES
from toolchain.text.sources import read_documents

BOOK = 'The gardener, in winter, prunes "the trees" [all of them]. ' * 200_000


def test_a_row_may_be_a_whole_book(tmp_path: Path):
    assert len(BOOK) > MAX_BYTES
    path = tmp_path / "books.jsonl"
    path.write_text(json.dumps({"text": BOOK}) + "\n" + json.dumps({"text": "short"}) + "\n")
    assert list(read_documents(path)) == [BOOK, "short"]


@pytest.mark.parametrize("piece", ["[],", '"",', "{},", "1,", "1e5,"])
def test_a_row_of_many_small_things_is_not_read(tmp_path: Path, piece: str):
    path = tmp_path / "bomb.jsonl"
    path.write_text('{"text": "a", "x": [' + piece * (60_000_000 // len(piece)) + "1]}\n")
    with pytest.raises(SenteiError, match="not one long text"):
        list(read_documents(path))


@pytest.mark.parametrize("kind", ["categories", "view"])
def test_columns_of_texts_in_arrows_other_forms(tmp_path: Path, kind: str):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pa.array(["one", "two", None, "one"])
    column = texts.dictionary_encode() if kind == "categories" else texts.cast(pa.string_view())
    parquet.write_table(pa.table({"text": column}), tmp_path / "text.parquet")
    assert list(read_documents(tmp_path / "text.parquet")) == ["one", "two", "one"]
