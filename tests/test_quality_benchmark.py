"""``benchmarks/quality.py`` keeps to its protocol, compares what was asked alike, and says first what it can find."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SETTINGS = {"model": "m", "choose": False, "calibration": "C4, documents 0 to 499", "discordant": 0.25,
            "texts": {"wikitext-2": "wikitext2_test.txt", "c4": "c4-600-999.jsonl"}}  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality
    import quality_table

    return SimpleNamespace(quality=quality, table=quality_table)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts and tasks as the benchmark looks for them, of two questions each."""
    place = tmp_path / "data"
    place.mkdir()
    text = "The gardener prunes the trees in winter. "
    for name in ("wikitext2_test", "wikitext2_valid"):
        (place / f"{name}.txt").write_text(text * 60)
    _write(place / "c4_sample_1000docs.jsonl", [{"text": f"Document {number}. {text * 4}"} for number in range(1000)])
    arc = {"question": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "B"}
    rows = {
        "winogrande_xl_dev": {
            "sentence": "The vase held, the _ fell.",
            "option1": "rug",
            "option2": "cup",
            "answer": "1",
        },
        "arc_easy_dev": arc,
        "arc_challenge_dev": arc,
        "hellaswag_dev_2000": {"context": "Baking: A man bakes. he", "endings": ["eats.", "flies."], "label": 0},
        "piqa_valid": {"goal": "To cool soup", "sol1": "blow on it.", "sol2": "heat it.", "label": 0},
        "mmlu_validation": {"question": "Q?", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 1},
    }
    for name, row in rows.items():
        _write(place / f"{name}.jsonl", [row, row])
    return place


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def documents(path: Path) -> list[int]:
    return [int(json.loads(line)["text"].split()[1].rstrip(".")) for line in path.read_text().splitlines()]


def test_no_document_both_calibrates_and_evaluates_or_chooses_and_decides(
    bench: SimpleNamespace, data: Path, tmp_path: Path
):
    calibration, final = bench.quality.texts_of(data, tmp_path, choose=False)
    assert documents(calibration) == list(range(500))
    assert documents(final["c4"]) == list(range(600, 1000))
    assert final["wikitext-2"].name == "wikitext2_test.txt"
    calibration, choosing = bench.quality.texts_of(data, tmp_path, choose=True)
    assert documents(calibration) == list(range(500))
    assert documents(choosing["c4"]) == list(range(500, 600))
    assert choosing["wikitext-2"].name == "wikitext2_valid.txt"
    _write(data / "c4_sample_1000docs.jsonl", [{"text": "x"}] * 700)
    with pytest.raises(SenteiError, match="has 700 documents, not 1000"):
        bench.quality.texts_of(data, tmp_path, choose=False)


def cell(right: str, norm: str | None = None, asked: str = "same") -> dict:
    both = {"acc": right} if norm is None else {"acc": right, "acc_norm": norm}
    return {"metric": list(both)[-1], "right": both, "prompts_sha256": asked, "key": "", "seconds": 1.0}


def columns(page: str, row: str) -> list[list[str]]:
    """A row's cells in each table that has it."""
    found = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith(f"| {row} |")]
    return [[each.strip() for each in line] for line in found]


def test_questions_of_all_tasks_are_tested_together_and_alone(bench: SimpleNamespace):
    rows = {
        "original": {"piqa": cell("1" * 8, "1" * 6 + "00"), "mmlu": cell("1111")},
        # acc_norm of PIQA: 5 lost, 1 gained; MMLU: 4 lost.
        "2ssp 0.25": {"piqa": cell("1" * 8, "10000010"), "mmlu": cell("0000")},
        "ours 0.25": {"piqa": cell("1" * 8, "11111100"), "mmlu": cell("0111")},
        "evopress 0.25": {"piqa": cell("1" * 8, "11111100", asked="otherwise"), "mmlu": cell("0111")},
    }
    page = bench.table.markdown(SETTINGS, {"piqa": 8, "mmlu": 4}, rows, baseline="2ssp")
    _, own, acc = columns(page, "2ssp")
    # 9 of 10 discordant questions lost: 2 (C(10, 0) + C(10, 1)) / 2^10 = 0.0215; alone 2 (1 + 6) / 2^6 and 2 / 2^4.
    assert own[2:] == ["25.0% (−5 +1)", "0.0% (−4 +0)", "16.7% (−9 +1, p 0.021)*", "12.5%", "14.3%"]
    assert acc[2:5] == ["100.0% (−0 +0)", "0.0% (−4 +0)", "66.7% (−4 +0, p 0.125)"]
    # Against the baseline: PIQA 5 gained, 1 lost, MMLU 3 gained: 8 of 9, 2 (1 + 9) / 2^9 = 0.039.
    assert columns(page, "ours")[-1] == ["ours", "0.25", "(−1 +5)", "(−0 +3)", "(−1 +8, p 0.039)*"]
    # What was asked otherwise is shown, and compared with nothing.
    other = columns(page, "evopress")
    assert other[1][2:5] == ["75.0%", "75.0% (−1 +0)", "75.0%"]
    assert other[-1] == ["evopress", "0.25", "", "(−0 +3)", ""]


def test_what_is_still_lost_is_a_share_of_the_baselines_nats(bench: SimpleNamespace):
    """By hand: of one nat and of two that the baseline loses, half a nat and 1.6 are left."""
    e = 2.718281828459045
    texts = {"original": (10.0, 20.0), "2ssp 0.5": (10 * e, 20 * e**2), "ours 0.5": (10 * e**0.5, 20 * e**1.6),
             "2ssp 0.25": (10.0, 20.0), "half 0.5": (10.0, None)}  # fmt: skip
    rows = {
        row: {name: {"perplexity": value} for name, value in zip(bench.table.TEXTS, both, strict=True) if value}
        for row, both in texts.items()
    }
    del rows["2ssp 0.25"]["c4"]
    page = bench.table.markdown(SETTINGS, {}, rows, baseline="2ssp")
    assert [columns(page, "ours")[0][at] for at in (5, 6, 7)] == ["2.86", "0.638", "0.65"]
    assert [found[7] for found in columns(page, "2ssp")] == ["", "1.00"]
    assert columns(page, "half")[0][5:8] == ["", "", ""]
    # Targets stand in their order, whatever was filled first.
    assert page.index("| 2ssp |") < page.index("27.18")


def test_power_is_said_before_any_result(bench: SimpleNamespace):
    page = bench.table.markdown(SETTINGS, {"piqa": 1838, "mmlu": 6}, {}, baseline="2ssp")
    said, first_table = page.index("Power, stated before any result"), page.index("| method |")
    assert said < first_table
    # Of six questions a quarter is discordant: too few for any test. The others: see the test of the power itself.
    assert "if 25% of the questions are discordant" in page
    assert "piqa (1,838) 3.3, mmlu (6) none, all questions (1,844) 3.3" in page


def test_the_original_alone_goes_on_where_it_ended_and_never_with_other_settings(
    bench: SimpleNamespace, data: Path, tmp_path: Path, pico_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench.quality, "METHODS", ())
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    out, asked = tmp_path / "out", {"data": data, "work": tmp_path / "work", "windows": 2, "seq_len": 16, "limit": 1}
    bench.quality.main(pico_model, out=out, max_minutes=-1, **asked)
    page = (out / "quality_pico.md").read_text()
    assert "all questions (6) none" in page
    assert columns(page, "original") == []
    bench.quality.main(pico_model, out=out, **asked)
    found = json.loads((out / "quality_pico.json").read_text())
    assert set(found["rows"]["original"]) == {"wikitext-2", "c4", *bench.quality.TASKS}
    assert all(len(found["rows"]["original"][task]["right"]["acc"]) == 1 for task in bench.quality.TASKS)
    assert set(found["rows"]["original"]["piqa"]["right"]) == {"acc", "acc_norm"}
    bench.quality.main(pico_model, out=out, max_minutes=-1, **asked)
    assert json.loads((out / "quality_pico.json").read_text())["rows"] == found["rows"]
    with pytest.raises(SenteiError, match=r"another limit \(1, now None\)"):
        bench.quality.main(pico_model, out=out, **{**asked, "limit": None})
    # For choosing there is a file of its own, without tasks.
    bench.quality.main(pico_model, out=out, choose=True, **asked)
    chosen = json.loads((out / "quality_pico_choose.json").read_text())
    assert set(chosen["rows"]["original"]) == {"wikitext-2", "c4"}
    assert json.loads((out / "quality_pico.json").read_text())["rows"] == found["rows"]
    with pytest.raises(SenteiError, match="'2sp' is not known"):
        bench.quality.main(pico_model, out=out, methods="2sp", **asked)


def test_a_method_that_goes_on_with_another_does_not_do_it_again_and_counts_its_time(
    bench: SimpleNamespace, data: Path, tmp_path: Path, pico_model: Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        ran.append(command[3:-1])
        source = pico_model if command[3] == "prune" else Path(command[4])
        shutil.copytree(source, command[command.index("-o") + 1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(bench.quality.subprocess, "run", run)
    monkeypatch.setattr(bench.quality, "_cpu_s_of_children", lambda: 100.0 * len(ran))
    out, work = tmp_path / "out", tmp_path / "work"
    asked = {"data": data, "work": work, "windows": 2, "seq_len": 16, "limit": 1, "sparsity": [0.5], "choose": True}
    bench.quality.main(pico_model, out=out, methods="ours", **asked)
    bench.quality.main(pico_model, out=out, methods="ours+heal", **asked)
    assert [command[0] for command in ran] == ["prune", "heal"]
    [healed, pruned] = (path for path in sorted(work.iterdir()) if path.is_dir())
    assert ran[1][1] == str(pruned)
    rows = json.loads((out / "quality_pico_choose.json").read_text())["rows"]
    assert [rows[row]["pruning"]["cpu_seconds"] for row in ("ours 0.5", "ours+heal 0.5")] == [100, 200]
    # A model that is gone is made again, from what is still there; what was measured of it stays.
    shutil.rmtree(pruned)
    shutil.rmtree(healed)
    del rows["ours+heal 0.5"]["c4"]
    document = json.loads((out / "quality_pico_choose.json").read_text())
    (out / "quality_pico_choose.json").write_text(json.dumps({**document, "rows": rows}))
    bench.quality.main(pico_model, out=out, methods="ours+heal", **asked)
    assert [command[0] for command in ran] == ["prune", "heal", "prune", "heal"]
    again = json.loads((out / "quality_pico_choose.json").read_text())["rows"]
    assert again["ours+heal 0.5"]["pruning"] == rows["ours+heal 0.5"]["pruning"]
    assert "c4" in again["ours+heal 0.5"]


def test_a_command_that_fails_is_named_in_one_sentence(
    bench: SimpleNamespace, data: Path, tmp_path: Path, pico_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench.quality.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(SenteiError, match=r"^ours 0.5: sentei prune ended with exit code 1"):
        bench.quality.main(
            pico_model, out=tmp_path / "out", data=data, work=tmp_path / "work", windows=2, seq_len=16, limit=1,
            sparsity=[0.5], choose=True, methods="ours",
        )  # fmt: skip


def test_another_model_of_the_same_name_is_refused(bench: SimpleNamespace, pico_model: Path, tmp_path: Path):
    settings = {"model": "pico", "weights_sha256": open_checkpoint(pico_model).fingerprint}
    path = tmp_path / "quality_pico.json"
    path.write_text(json.dumps({"settings": {**settings, "weights_sha256": "other"}, "rows": {}}))
    with pytest.raises(SenteiError, match="another weights_sha256"):
        bench.quality.Table(path, settings, {}, deadline=0)
