"""From a mixture to a plan, and from the plan to a warning where evaluation reads what calibration had read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_line import refused, sentei
from toolchain.plan.plan import load_plan
from toolchain.text.embedded import documents
from toolchain.text.fingerprints import PASSAGE_TOKENS

_PROSE = [each[:800] for each in documents() if len(each) > 800]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return path


@pytest.fixture(scope="module")
def calibrated(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model that read the first documents of two texts, three quarters and one quarter."""
    place = tmp_path_factory.mktemp("overlap")
    one, other = write(place / "one.jsonl", _PROSE[:20]), write(place / "other.jsonl", _PROSE[20:30])
    done = sentei(
        "prune", pico_model, "-o", place / "pruned", "--calibration", f"3:{one}", "--calibration", f"1:{other}",
        "--samples", 24, "--seq-len", 64, "--sparsity", 0.3, "--align", 8, "--attention-removals", 1, "--compensate",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return place / "pruned"


def evaluate(directory: Path, *more: object) -> dict:
    done = sentei("evaluate", directory, "--seq-len", 64, "--json", *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_plan_says_what_each_text_gave(calibrated: Path):
    record = json.loads((calibrated / "plan.json").read_text())["calibration"]
    assert record["source"] == "one.jsonl + other.jsonl"
    given = [(each["source"], each["weight"], each["num_windows"]) for each in record["sources"]]
    assert given == [("one.jsonl", 0.75, 18), ("other.jsonl", 0.25, 6)]
    said = "one.jsonl (18 windows, weight 0.75); other.jsonl (6 windows, weight 0.25)"
    assert said in sentei("plan", "show", calibrated).stdout
    assert said in (calibrated / "README.md").read_text()


def test_a_compensated_plan_takes_the_same_mixture_again(calibrated: Path, pico_model: Path, tmp_path: Path):
    texts = [calibrated.parent / "one.jsonl", calibrated.parent / "other.jsonl"]
    command = ["apply", calibrated, pico_model, "-o", tmp_path / "out"]
    refused(sentei(*command, "--calibration", texts[0], "--calibration", texts[1]), "in the same order")
    done = sentei(*command, "--calibration", f"0.75:{texts[0]}", "--calibration", f"0.25:{texts[1]}")
    assert done.returncode == 0, done.stderr
    assert load_plan(tmp_path / "out").text_hashes["calibration"].size > 0


def test_what_was_calibrated_with_is_known_again(calibrated: Path, tmp_path: Path):
    # Of what is evaluated, the first document of each text was read; window borders lie elsewhere.
    mixed = write(tmp_path / "mixed.jsonl", [*_PROSE[40:42], _PROSE[0], _PROSE[42], _PROSE[20], *_PROSE[43:45]])
    fresh = write(tmp_path / "fresh.jsonl", _PROSE[45:48])
    found = evaluate(calibrated, "--text", mixed, "--text", fresh)["text_overlaps"]
    assert [(each["text"], each["seen_in"]) for each in found] == [
        ("mixed.jsonl", "calibration"), ("fresh.jsonl", "calibration"),
    ]  # fmt: skip
    assert found[1]["share"] == 0
    assert found[0]["unit"] == "document"
    assert {each["number"] for each in found[0]["passages"]} == {2, 4}
    assert 0.2 < found[0]["share"] < 0.35
    # All of them but the passages at their ends, which go on into the next document.
    assert min(each["share"] for each in found[0]["passages"]) > 0.7
    assert found[0]["num_seen"] == 2
    shown = sentei("evaluate", calibrated, "--text", mixed, "--seq-len", 64).stdout
    assert "of mixed.jsonl was read in calibration (2 of 7 documents hold some of it)" in shown
    assert "Warning" not in sentei("evaluate", calibrated, "--text", fresh, "--seq-len", 64).stdout


def test_where_nothing_is_known_nothing_is_said(calibrated: Path, pico_model: Path, tmp_path: Path):
    text = calibrated.parent / "one.jsonl"
    assert evaluate(pico_model, "--text", text, "--windows", 2)["text_overlaps"] == []
    # A plan of an earlier version, or without its scores.
    (calibrated / "plan.safetensors").rename(tmp_path / "plan.safetensors")
    try:
        assert evaluate(calibrated, "--text", text, "--windows", 2)["text_overlaps"] == []
    finally:
        (tmp_path / "plan.safetensors").rename(calibrated / "plan.safetensors")


def test_the_hashes_go_where_the_plan_goes(calibrated: Path, tmp_path: Path):
    hashes = load_plan(calibrated).text_hashes["calibration"]
    assert hashes.size <= 24 * 64 - 2 * (PASSAGE_TOKENS - 1)
    assert hashes.size > 24 * 64 / 2
    assert sentei("plan", "cut", calibrated, "--step", 0, "-o", tmp_path / "cut").returncode == 0
    assert (load_plan(tmp_path / "cut").text_hashes["calibration"] == hashes).all()


def test_compare_methods_warns_in_its_table(pico_model: Path, tmp_path: Path):
    text = write(tmp_path / "text.jsonl", _PROSE[:10])
    done = sentei(
        "compare-methods", pico_model, "-o", tmp_path / "out", "--calibration", text, "--text", text, "--samples", 2,
        "--windows", 2, "--seq-len", 64, "--align", 8, "--sparsity", 0.4, "--methods", "2ssp",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in (done.stdout, (tmp_path / "out" / "comparison.md").read_text()):
        assert "Warning: 100 % of text.jsonl was read in calibration" in " ".join(said.split())


def test_a_report_warns_too(calibrated: Path, pico_model: Path, tmp_path: Path):
    text = calibrated.parent / "one.jsonl"
    out = tmp_path / "evaluation"
    done = sentei(
        "evaluate", calibrated, "--against", pico_model, "--text", text, "--windows", 4, "--seq-len", 64,
        "--generations", 0, "-o", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for language, said in (("en", "100 % of one.jsonl was read in calibration"), ("ja", "one.jsonl の 100 % は")):
        page = tmp_path / f"{language}.md"
        assert sentei("report", calibrated, out, "-o", page, "--lang", language).returncode == 0
        assert said in page.read_text()


def test_a_plan_without_hashes_is_read(calibrated: Path):
    plan = replace(load_plan(calibrated), text_hashes={})
    (old := calibrated.parent / "old").mkdir()
    plan.save(old)
    document = json.loads((old / "plan.json").read_text())
    del document["calibration"]["sources"]
    (old / "plan.json").write_text(json.dumps(document))
    assert load_plan(old).text_hashes == {}
    assert "Python" not in sentei("plan", "show", old).stdout
