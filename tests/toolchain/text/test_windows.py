"""Texts, weights and windows: what a person writes after --calibration, and what is read then."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from toolchain.errors import SenteiError
from toolchain.metrics.questions import read_questions
from toolchain.text.embedded import SOURCE
from toolchain.text.sources import HubDataset, TextSource, parse_sources, parse_text, read_documents, text_name
from toolchain.text.windows import load_mixture, load_windows, split_by_weight, windows_apart

WORDS = {f"{kind}{number}": place for place, (kind, number) in enumerate((k, n) for k in "ej" for n in range(100))}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({**WORDS, "?": len(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """An English text of 100 words, and a Japanese one of 60."""
    english, japanese = tmp_path / "en.txt", tmp_path / "ja.jsonl"
    english.write_text(" ".join(f"e{number}" for number in range(100)))
    lines = [" ".join(f"j{number}" for number in range(start, start + 20)) for start in (0, 20, 40)]
    japanese.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return english, japanese


@pytest.mark.parametrize(
    ("given", "text", "weight"),
    [
        ("ja.txt", Path("ja.txt"), 1.0),
        ("0.5:ja.txt", Path("ja.txt"), 0.5),
        ("2:hub:a/b:20231101.ja", HubDataset("a/b", "20231101.ja", "train"), 2.0),
        ("hub:a/b", HubDataset("a/b", None, "train"), 1.0),
        ("hub:a/b::test", HubDataset("a/b", None, "test"), 1.0),
        ("C:/texts/ja.txt", Path("C:/texts/ja.txt"), 1.0),
        ("0.5:C:/texts/ja.txt", Path("C:/texts/ja.txt"), 0.5),
        ("./0.5:odd.txt", Path("0.5:odd.txt"), 1.0),
        ("notes:2.txt", Path("notes:2.txt"), 1.0),
    ],
)
def test_what_is_written_is_what_is_meant(given: str, text: Path | HubDataset, weight: float):
    assert parse_sources([given]) == (TextSource(text, weight),)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["0:a.txt"], "weight 0 makes no sense"),
        (["-1:a.txt"], "weight -1 makes no sense"),
        (["nan:a.txt"], "weight nan makes no sense"),
        (["inf:a.txt"], "weight inf makes no sense"),
        (["0.5:a.txt", "b.txt"], "b.txt has no weight, and other texts have"),
        (["1:a.txt", "2:a.txt"], "a.txt is given twice"),
        (["hub:"], "names no data set"),
        (["hub:a:b:c:d"], "names no data set"),
    ],
)
def test_bad_mixtures_are_refused(given: list[str], sentence: str):
    with pytest.raises(SenteiError, match=sentence):
        parse_sources(given)


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(1, 500))
def test_shares_add_up_and_are_within_one_of_their_proportion(weights: list[float], count: int):
    shares = split_by_weight(weights, count)
    assert sum(shares) == count
    assert all(abs(each - count * weight / sum(weights)) < 1 for each, weight in zip(shares, weights, strict=True))


def test_windows_of_a_mixture(tokenizer, texts: tuple[Path, Path]):
    english, japanese = texts
    windows = load_mixture(parse_sources([f"0.75:{english}", f"0.25:{japanese}"]), tokenizer, num_samples=8, seq_len=10)
    # The first of each, then spread evenly; of each text its first windows, in order.
    starts = [tokenizer.convert_ids_to_tokens(int(each)) for each in windows.ids[:, 0]]
    assert starts == ["e0", "j0", "e10", "e20", "e30", "e40", "j10", "e50"]
    assert windows.first_of_each[:, 0].tolist() == [WORDS["e0"], WORDS["j0"]]
    assert windows.source == "en.txt + ja.jsonl"
    recorded = [(each.source, each.weight, each.num_windows) for each in windows.sources]
    assert recorded == [("en.txt", 0.75, 6), ("ja.jsonl", 0.25, 2)]
    for path, each in zip(texts, windows.sources, strict=True):
        alone = load_windows(path, tokenizer, num_samples=each.num_windows, seq_len=10)
        assert alone.sha256 == each.sha256


def test_windows_apart_follow_those_of_the_mixture_in_each_text(tokenizer, texts: tuple[Path, Path]):
    english, japanese = texts
    sources = parse_sources([f"0.75:{english}", f"0.25:{japanese}"])
    windows = load_mixture(sources, tokenizer, num_samples=8, seq_len=10)
    ids, records = windows_apart(sources, tokenizer, windows)
    assert ids[:, 0].tolist() == [WORDS["e60"], WORDS["j20"]]
    assert [(each.source, each.weight, each.num_windows) for each in records] == [
        ("en.txt", 0.75, 1),
        ("ja.jsonl", 0.25, 1),
    ]
    # More than eight of a text ask for two of it; and there has to be as much.
    windows = load_mixture(sources, tokenizer, num_samples=12, seq_len=5)
    assert [each.num_windows for each in windows_apart(sources, tokenizer, windows)[1]] == [2, 1]


def test_a_short_text_shortens_a_mixture_that_may_be_shorter(tokenizer, texts: tuple[Path, Path]):
    sources = [TextSource(path) for path in texts]
    with pytest.raises(SenteiError, match=r"ja.jsonl is too short: it has 60 tokens, and 8 windows of 10 tokens need"):
        load_mixture(sources, tokenizer, num_samples=16, seq_len=10)
    windows = load_mixture(sources, tokenizer, num_samples=16, seq_len=10, fewer_will_do=True)
    # Half and half, as far as that goes: of an odd number the first text has one more.
    assert [each.num_windows for each in windows.sources] == [7, 6]
    uneven = [TextSource(texts[0], 0.01), TextSource(texts[1], 0.99)]
    with pytest.raises(SenteiError, match="too short for its weight"):
        load_mixture(uneven, tokenizer, num_samples=100, seq_len=10, fewer_will_do=True)


def test_a_text_without_a_window_is_said(tokenizer, texts: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(SenteiError, match=r"ja.jsonl gets none of 4 windows at weight 0.01"):
        load_mixture([TextSource(texts[0]), TextSource(texts[1], 0.01)], tokenizer, num_samples=4, seq_len=10)
    (empty := tmp_path / "empty.txt").write_text("")
    with pytest.raises(SenteiError, match=r"empty.txt is too short: it has 0 tokens"):
        load_mixture([TextSource(empty)], tokenizer, num_samples=1, seq_len=10)


def test_without_a_text_it_is_pythons_manual(tokenizer):
    windows = load_mixture([], tokenizer, num_samples=2, seq_len=8)
    assert windows.source == windows.sources[0].source == text_name(None) == SOURCE


def test_a_directory_is_all_text_files_in_it(tmp_path: Path):
    (tmp_path / "texts" / "below").mkdir(parents=True)
    for name, content in (
        ("b.txt", "second"),
        ("a.jsonl", '{"text": "first"}'),
        ("below/c.TXT", "third"),
        ("d.md", "no"),
    ):
        (tmp_path / "texts" / name).write_text(content)
    assert list(read_documents(tmp_path / "texts")) == ["first", "second", "third"]
    (tmp_path / "none").mkdir()
    with pytest.raises(SenteiError, match="holds no text file"):
        read_documents(tmp_path / "none")
    with pytest.raises(SenteiError, match="does not exist"):
        read_documents(tmp_path / "a/b")


def test_a_data_set_that_lies_in_a_directory(tmp_path: Path):
    """What the hub holds, mirrored: parquet files and a card that says which belongs to which configuration."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for config in ("ja", "en"):
        for split in ("train", "test"):
            parquet.write_table(
                pyarrow.table({"id": [1, 2], "text": [f"{config} {split} 1", f"{config} {split} 2"]}),
                tmp_path / f"{config}-{split}.parquet",
            )
    files = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - {{split: {split}, path: {config}-{split}.parquet}}\n" for split in ("train", "test"))
        for config in ("ja", "en")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    assert list(read_documents(parse_text(f"hub:{tmp_path}:ja"))) == ["ja train 1", "ja train 2"]
    assert list(read_documents(parse_text(f"hub:{tmp_path}:en:test"))) == ["en test 1", "en test 2"]
    for wrong in (f"hub:{tmp_path}:fr", f"hub:{tmp_path}", f"hub:{tmp_path}:ja:dev", "hub:nobody/nothing"):
        with pytest.raises(SenteiError, match="cannot be read"):
            list(read_documents(parse_text(wrong)))


def test_a_data_set_without_text(tmp_path: Path):
    pytest.importorskip("datasets")
    (tmp_path / "data.jsonl").write_text('{"content": "here"}\n')
    with pytest.raises(SenteiError, match='no column "text" of strings; it has content'):
        list(read_documents(parse_text(f"hub:{tmp_path}")))


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_file_in_another_encoding_is_one_sentence(tmp_path: Path, ending: str):
    path = tmp_path / f"text.{ending}"
    path.write_bytes(json.dumps({"text": "größer"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(SenteiError, match="is not UTF-8 text"):
        list(read_documents(path))


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_the_mark_in_front_of_a_file_is_no_part_of_it(tmp_path: Path, ending: str):
    path = tmp_path / f"text.{ending}"
    path.write_text(json.dumps({"text": "größer"}) if ending == "jsonl" else "größer", encoding="utf-8-sig")
    assert list(read_documents(path)) == ["größer"]


def test_questions_in_another_encoding_are_one_sentence(tmp_path: Path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes('{"prompt": "größer"}'.encode("latin-1"))
    with pytest.raises(SenteiError, match="is not UTF-8 text"):
        read_questions(path)
    path.write_text("{}\n", encoding="utf-8-sig")
    assert read_questions(path) == [(f"{path} line 1", {})]
