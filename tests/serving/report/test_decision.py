"""The decision paper: who reads only its first lines must not be misled, nor who cannot see its pictures."""

import html
import re

import pytest

from serving.decision.document import VERDICT_FILE
from serving.poc.run import decided
from serving.report.decision import verdict_text
from serving.report.render import render_report
from serving.report.translate import Say
from tests.serving.decision.making import ORIGINAL, WITHOUT_LIMITS, candidate, interval
from tests.serving.poc.world import steps_of
from toolchain.errors import SenteiError

HOSTILE = "<script>alert(1)</script>|[x](http://x)"


def written(directory, *candidates, original=ORIGINAL, **changed):
    poc = steps_of(directory, **changed).poc
    document = decided(poc, "own", original, candidates, "output_throughput")
    (directory / VERDICT_FILE).write_text(document.to_json(), encoding="utf-8")
    return document


def good():
    questions = {"accuracy": interval(0.7), "accuracy_change": interval(-0.05), "groups": {"safety": interval(0.95)}}
    return candidate(**questions), candidate("37.5 %", sparsity=0.375, gain=None, perplexity={"own.txt": interval(1.9)})


def text_of(page: str) -> str:
    body = re.sub(r"<script.*?</script>|<style.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.mark.parametrize(
    ("language", "first"),
    [
        ("en", "Deploy 25 %: it runs at 1.3 times the original's speed (95 % interval 1.27–1.33)."),
        ("ja", "「25 %」の採用を推奨します。速度は元モデルの 1.3 倍です（95 % 信頼区間 1.27–1.33 倍）。"),
    ],
)
def test_the_verdict_comes_first_and_every_light_is_a_word(language, first, tmp_path):
    document = written(tmp_path, *good(), guard_rails={"most_perplexity": 1.2, "groups": {"safety": 0.9}})
    render_report([tmp_path], tmp_path / "report.html", language=language)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = text_of(page)
    assert shown.index(first) < 400
    assert verdict_text(document, Say(language)).splitlines()[0] == first
    for word in ("green", "red", "cannot be told", "not measured", "output tokens per second"):
        assert Say(language)(word) in shown
    # Pictures have words of their own, tables have headers for rows and columns.
    pictures = re.findall(r'role="img" aria-label="([^"]+)"', page)
    assert len(pictures) == 2 and all("25 %" in each and "1.1" in each for each in pictures)
    assert page.count('<th scope="row">25 %') == 3
    # All of the first candidate's lights are green, with what was measured.
    row = page[page.index('<th scope="row">25 %') :].split("</tr>")[0]
    assert row.count("tag good") == 4 and "tag open" not in row and "95.0 % (93.1–96.9)" in text_of(row)
    assert "●" in page and "■" in page


def test_in_japanese_nothing_of_the_decision_is_left_in_english(tmp_path):
    written(tmp_path, *good(), guard_rails={"most_perplexity": 1.2, "groups": {"safety": 0.9}})
    render_report([tmp_path], tmp_path / "report.md", language="ja")
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    part = page[: page.index(Say("ja")("The candidate in detail"))]
    # Names and units stay; a sentence would have several words in a row.
    assert re.findall(r"[A-Za-z']{2,} [a-z']{2,} [a-z']{2,}", part) == []


@pytest.mark.parametrize("suffix", ["html", "md"])
@pytest.mark.parametrize(
    ("language", "told", "gpus"),
    [
        ("en", "So GPUs and cost are not computed: they need limits, below workload in poc.yaml.", "saves"),
        ("ja", "poc.yaml の workload に応答時間の上限（limits）を書くと", "台"),
    ],
)
def test_without_limits_the_sheet_says_why_it_counts_no_gpus(language, told, gpus, suffix, tmp_path):
    peak = {"peak_requests_per_s": 10, "price_per_hour": 2}
    document = written(tmp_path, candidate(), original=WITHOUT_LIMITS, capacity=peak)
    out = tmp_path / f"report.{suffix}"
    render_report([tmp_path], out, language=language)
    page = out.read_text(encoding="utf-8")
    assert told in (text_of(page) if suffix == "html" else page)
    assert gpus not in verdict_text(document, Say(language))


def test_do_not_prune_is_not_painted_green(tmp_path):
    written(tmp_path, candidate(gain=interval(1.0)))
    render_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'class="verdict bad"' in page and 'class="verdict good"' not in page
    assert "Do not prune: no candidate is shown to be within all guard rails." in text_of(page)


@pytest.mark.parametrize("suffix", ["html", "md"])
def test_names_of_strangers_stay_text(suffix, tmp_path):
    questions = {"groups": {HOSTILE: interval(0.95)}, "accuracy": interval(0.9)}
    strange = candidate(HOSTILE, perplexity={HOSTILE: interval(1.1)}, not_measured=HOSTILE, **questions)
    rails = {"most_perplexity": 1.2, "groups": {HOSTILE: 0.99}}
    written(tmp_path, strange, candidate(memory_bytes=1), guard_rails=rails, capacity={"currency": "<b>"})
    out = tmp_path / f"report.{suffix}"
    render_report([tmp_path], out)
    page = out.read_text(encoding="utf-8")
    if suffix == "html":
        assert "<script>alert" not in page and "<b>" not in page
    else:
        assert "|[x](http" not in page and "\n<script" not in page


def test_two_verdicts_are_no_verdict(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, candidate(name))
    with pytest.raises(SenteiError, match="a report has one verdict"):
        render_report([tmp_path], tmp_path / "report.html")


def test_no_candidate_at_all_is_a_page_too(tmp_path):
    written(tmp_path)
    render_report([tmp_path], tmp_path / "report.html")
    assert "no candidate was measured" in text_of((tmp_path / "report.html").read_text(encoding="utf-8"))
