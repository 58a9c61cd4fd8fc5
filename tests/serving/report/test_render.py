import json
import re
from typing import ClassVar

import numpy as np
import pytest

from serving.benchmark.goodput import GOODPUT_METRICS
from serving.benchmark.gpu_watch import NOT_RECORDED
from serving.benchmark.metrics import METRICS
from serving.benchmark.ratios import compare_repeats
from serving.forecast.explain import CLIENT
from serving.forecast.gap import OVERHEAD
from serving.report import render as report
from serving.report.format import format_bytes, format_change, format_count, format_ratio
from serving.report.render import render_report
from serving.report.speed import FORMER_FORMULAS
from serving.report.speed_charts import _ratio_ticks
from serving.report.translate import Say
from tests.command_line import refused, sentei
from toolchain.errors import SenteiError
from toolchain.plan.document import (
    BaseModelRecord,
    CalibrationRecord,
    PlanDocument,
    PlannedLayer,
    ProtectedRecord,
    Removal,
    Rung,
)
from toolchain.plan.plan import PruningPlan
from toolchain.plan.target_record import PartCostsRecord, TargetRecord, TargetRound, TargetValue


def target_of(widths, *, left_open=False):
    """One attention and some neurons of four layers of 48 for a speed-up."""
    per_token = PartCostsRecord(outside=1.0, attention=0.5, widths=[12, 48], ffn=[0.25, 1.0])
    kv = PartCostsRecord(outside=0.0, attention=64.0, widths=[12, 48], ffn=[0.0, 0.0])
    return TargetRecord(
        asked=["speedup=1.3"], costs_sha256="ef" * 32, served="onnx, 16 tokens in, 8 out, 1 at a time",
        costs={"ttft_ms": per_token, "ms_per_output_token": per_token, "kv_bytes_per_token": kv},
        rounds=[
            TargetRound(
                intermediate_size=widths, removed_attention=[2], predicted_damage=0.5,
                ffn_damage=[0.1, 0.05, 0.1, 0.05], attention_damage=0.2,
                values=[
                    TargetValue(
                        asked="speedup=1.3", unit="x", predicted=1.31, predicted_low=1.29, predicted_high=1.33,
                        measured=1.3, measured_low=1.28, measured_high=1.32,
                    )
                ],
            )
        ],
        taken=0, met=True, left_open=left_open,
    )  # fmt: skip


def write_plan(directory, name="tiny", *, for_a_target=False, left_open=False):
    widths = [32, 40, 32, 40]
    document = PlanDocument(
        schema_version=2, sentei_version="0.1.0", method="2ssp",
        base_model=BaseModelRecord(
            name=name, model_type="llama", num_hidden_layers=4, intermediate_size=48, num_block_parameters=10_000,
            weights_sha256="ab" * 32,
        ),
        target_sparsity=0.25, target_intermediate_size=widths, target_attention_removals=1, align=8,
        allocation="target" if for_a_target else "formula",
        target=target_of(widths, left_open=left_open) if for_a_target else None,
        attention_removals=None, widths="uniform", protected=ProtectedRecord(),
        search="exact", metric="perplexity", metric_source=None, metric_higher_is_better=False,
        metric_original=20.0, limit=None, stopped_because=None, dtype="float32", seed=0,
        calibration=CalibrationRecord(source="calibration.txt", sha256="cd" * 32, num_samples=2, seq_len=16),
        versions={"torch": "2.13.0"},
        layers=[
            PlannedLayer(layer=i, attention="remove" if i == 2 else "keep", intermediate_size=width)
            for i, width in enumerate(widths)
        ],
        stage_1=[Rung(intermediate_size=widths, num_block_parameters=8_000, metric=24.0)],
        trace=[
            Removal(removed=2, metric=26.0, candidates={0: 90.0, 1: 40.0, 2: 26.0, 3: 27.0}, num_block_parameters=7_500)
        ],
    )  # fmt: skip
    PruningPlan(document, tuple(np.ones(48, np.float32) for _ in range(4))).save(directory)


def write_summary(directory, name="tiny"):
    write(directory, "pruning_summary.json", {
        "kind": "pruning_summary", "sparsity": 0.251, "duration_s": 1.0,
        "original": {"name": name, "num_parameters": 2_000_000, "num_block_parameters": 10, "weight_bytes": 8_000_000},
        "pruned": {"name": name, "num_parameters": 1_500_000, "num_block_parameters": 8, "weight_bytes": 6_000_000},
        "removed_attention": [2], "intermediate_size": [32, 40, 32, 40],
        "calibration_metric": {"name": "perplexity", "source": None, "original": 20.0, "after_stage_1": 24.0,
                               "after_stage_2": 26.0, "pruned": 26.0},
        "num_refitted": 0, "compensation": None, "stopped_because": None,
    })  # fmt: skip


def write_evaluation(directory, text="held-out.txt"):
    common = {
        "directory": "d",
        "text": text,
        "text_sha256": "ef" * 32,
        "num_tokens": 100,
        "num_windows": 4,
        "seq_len": 26,
    }
    write(directory, "evaluation.json", {"kind": "evaluation", "evaluations": [
        {**common, "model": "original", "perplexity": 30.0, "standard_error": 1.5},
        {**common, "model": "pruned", "perplexity": 45.0, "standard_error": None},
    ]})  # fmt: skip


def write_verification(directory, *, passed=True):
    write(directory, "verification.json", {
        "sentei_version": "0.1.0", "passed": passed, "engine": "onnx", "dtype": "float32", "not_run": "",
        "source_fingerprint": "ab" * 32, "prompts": "built-in", "num_prompts": 12, "num_tokens": 300,
        "max_difference": 0.000123, "mean_difference": 0.00001, "top1_agreement": 1.0,
        "tolerances": {"max_difference": 0.001},
        "checks": {"max_difference": {"passed": passed, "value": 0.000123, "limit": 0.001}},
    })  # fmt: skip


def write_results(directory, *, gains, expected=1.25, engine="onnx"):
    runs = []
    for repeat, gain in enumerate(gains):
        original = {m.name: 100.0 + repeat for m in METRICS}
        pruned = {m.name: original[m.name] * (gain if m.better == "higher" else 1 / gain) for m in METRICS}
        runs.append({"repeat": repeat, "order": ["original", "pruned"], "original": original, "pruned": pruned})
    size = {"unit": "bytes", "formula": "counted", "original": 8_000_000, "pruned": 6_000_000, "ratio": 0.75}
    write(directory, "results.json", {
        "kind": "benchmark", "sentei_version": "0.1.0", "engine": engine, "primary_metric": "output_throughput",
        "ratio_formula": "paired",
        "options": {"device": "cpu", "engine_options": []},
        "models": {side: {"name": side, "directory": side, "weights_sha256": 64 * side[0], "precision": "float32",
                          "device": "cpu"}
                   for side in ("original", "pruned")},
        "sizes": {"weight_bytes": size, "peak_memory_bytes": {**size, "original": None, "pruned": None, "ratio": None}},
        "measurements": [{
            "workload": {"input_len": 64, "output_len": 8, "concurrency": 1, "request_rate": None,
                         "range_ratio": 0.0, "num_prompts": 1, "seed": 0, "prompts": "random token ids",
                         "ignore_eos": True},
            "metrics": compare_repeats(runs), "runs": runs, "failed_requests": {"original": 0, "pruned": 0},
            "percentiles": {}, "cost": None,
            "expected": {"output_throughput": {"phase": "decode", "gain": expected, "formula": "bytes"}},
        }],
        "goodput": None, "device_peaks": None, "gpu_state": NOT_RECORDED, "failed_attempts": [],
        "environment": {"cpu": "A CPU", "accelerators": [], "versions": {"torch": "2.13.0"}},
    })  # fmt: skip


def write_sweep(directory, *, failed=0):
    """Two loads of vLLM with distributions, the second with failed requests if wanted, and a search for a rate."""
    write_results(directory, gains=[1.2, 1.22, 1.21], engine="vllm")
    results = json.loads((directory / "results.json").read_text())
    first = results["measurements"][0]
    spread = {"5": 10.0, "50": 20.0, "99": 90.0}
    first["percentiles"] = {time: {"original": spread, "pruned": spread} for time in ("ttft", "tpot", "itl", "e2el")}
    first["why_not_more"] = [{"cause": "client", "message": CLIENT, "values": {"cores": "1.2"}, "text": "..."}]
    second = json.loads(json.dumps(first))
    second["workload"]["concurrency"] = 4
    second["failed_requests"]["pruned"] = failed
    results["measurements"].append(second)
    tried = {"max_request_rate": 2.0, "request_goodput": 1.9,
             "tried": [{"request_rate": 2.0, "met": 0.95}, {"request_rate": 4.0, "met": 0.4}]}  # fmt: skip
    better = {**tried, "max_request_rate": 3.0}
    order = ["original", "pruned"]
    runs = [{"repeat": repeat, "order": order, "original": tried, "pruned": better} for repeat in range(3)]
    results["goodput"] = {
        "slo_ms": {"ttft": 500, "tpot": 50}, "attainment": 0.9, "runs": runs,
        "metrics": compare_repeats(runs, primary="max_request_rate", metrics=GOODPUT_METRICS),
    }  # fmt: skip
    (directory / "results.json").write_text(json.dumps(results))


def write(directory, name, content):
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps({"schema_version": 1, **content}))


def page_text(path):
    """The page without scripts and style."""
    page = path.read_text(encoding="utf-8")
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)


@pytest.fixture
def everything(tmp_path):
    source = tmp_path / "run"
    source.mkdir()
    write_plan(source)
    write_summary(source)
    write_evaluation(source)
    write_verification(source / "onnx")
    write_results(source / "benchmark", gains=[1.20, 1.22, 1.21])
    return source


def test_every_part_is_there(everything, tmp_path):
    summary = render_report([everything], tmp_path / "report.html")
    text = page_text(tmp_path / "report.html")
    assert summary["missing"] == []
    assert summary["verdict"][0]["gain"] == "1.21x"
    for expected in (
        "−25.0 %", "8 MB → 6 MB", "25.1 % of the decoder", "+50.0 %", "held-out.txt", "1.21x the speed",
        "The measurement falls short of it.", "Attention is gone from 1 of 4 layers",
        "32 to 40 of 48", "onnx: <span class=\"tag good\">passed", "max_difference", "calibration.txt",
    ):  # fmt: skip
        assert expected in text, expected
    assert "Peak memory" not in text  # neither side's is known
    assert text.count('class="plotly-graph-div"') == 4


@pytest.mark.parametrize(
    ("name", "language", "says"),
    [
        ("report.html", "en", "What the target bought"),
        ("report.html", "ja", "目標達成の内訳"),
        ("report.md", "en", "What the target bought"),
    ],
)
def test_what_a_target_bought_with_what(everything, tmp_path, name, language, says):
    assert "speedup=1.3" not in page_text(render(everything, tmp_path / f"without-{name}", language))
    write_plan(everything, for_a_target=True)
    text = page_text(render(everything, tmp_path / name, language))
    assert says in text
    # An attention: half a millisecond and 64 bytes for 0.2 nats. FFNs: 48 neurons, at 0.75 ms per 36, for 0.3 nats.
    for number in ("speedup=1.3", "1.31 x (1.29–1.33)", "1.3 x (1.28–1.32)", "4 → 3", "2 → 1.5", "256 → 192", "320",
                   "192 → 144", "4 → 3", "3.33"):  # fmt: skip
        assert number in text, number


@pytest.mark.parametrize(
    ("name", "language", "says"),
    [
        ("report.html", "en", "scatter too much to tell whether the target is met"),
        ("report.html", "ja", "目標に届いたかどうかは判断できません"),
        ("report.md", "en", "scatter too much to tell whether the target is met"),
    ],
)
def test_a_target_that_nobody_can_say_is_met(everything, tmp_path, name, language, says):
    for left_open in (False, True):
        write_plan(everything, for_a_target=True, left_open=left_open)
        text = page_text(render(everything, tmp_path / f"{left_open}-{name}", language))
        assert (says in text) == left_open


def render(source, out, language):
    render_report([source], out, language=language)
    return out


def test_the_page_needs_no_network(everything, tmp_path):
    render_report([everything], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = page_text(tmp_path / "report.html")
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//""", text)
    assert "<link" not in text
    assert not re.search(r"<script[^>]+src", page)
    assert page.count("plotly.js v") == 1
    assert "@import" not in page[: page.index("<script>")]


@pytest.mark.parametrize(
    ("gains", "expected", "sentences"),
    [
        ([0.9, 1.2, 1.0], 1.1, ["No difference shown", "The interval holds that too"]),
        ([1.0, 1.01, 0.99], 1.3, ["No difference shown", "falls short of it"]),
        ([0.8, 0.81, 0.82], 1.3, ["is worse", "falls short of it"]),
        ([1.5, 1.51, 1.52], 1.3, ["1.51x the speed", "is above it"]),
        ([1.28, 1.30, 1.32], 1.3, ["1.30x the speed", "lies inside the measured interval"]),
    ],
)
def test_the_verdict_is_said_plainly(tmp_path, gains, expected, sentences):
    write_results(tmp_path / "b", gains=gains, expected=expected)
    render_report([tmp_path / "b"], tmp_path / "report.html")
    text = page_text(tmp_path / "report.html")
    for sentence in sentences:
        assert sentence in text


def test_a_sweep_shows_its_curves_its_distributions_and_the_highest_load(tmp_path):
    write_sweep(tmp_path / "sweep")
    render_report([tmp_path / "sweep"], tmp_path / "report.html")
    text = page_text(tmp_path / "report.html")
    charts = set(re.findall(r'id="chart-([^"]+)"', text))
    assert {f"curve-0-concurrency-mean_{time}_ms" for time in ("ttft", "tpot", "e2el")} <= charts
    assert {f"distribution-0-{load}-itl" for load in (0, 1)} <= charts
    assert {"gain-0-0", "gain-0-1", "goodput-0"} <= charts
    assert "Highest load in vLLM with TTFT ≤ 500 ms, TPOT ≤ 50 ms" in text
    assert "1.50x" in text
    assert "The load generator used 1.2 processor cores" in text
    # Who does not see the charts is told what they show.
    for words in (
        "Percentiles of TTFT. original: p5: 10 ms; p50: 20 ms; p99: 90 ms. pruned: p5",
        "TPOT at each load. original: 1 at a time: 101 tokens/s, 101 ms; 4 at a time: 101 tokens/s, 101 ms. pruned",
        "pruned: 2 requests/s: 95 %; 2 requests/s: 95 %; 2 requests/s: 95 %; 4 requests/s: 40 %",
    ):
        assert re.search(f'role="img" aria-label="[^"]*{re.escape(words)}', text), words


def test_a_load_with_failed_requests_is_not_compared(tmp_path):
    write_sweep(tmp_path / "sweep", failed=2)
    render_report([tmp_path / "sweep"], tmp_path / "report.html")
    text = page_text(tmp_path / "report.html")
    assert "2 requests failed (pruned), so nothing is compared" in text
    assert "curve-0-concurrency" not in text


def test_failed_requests_of_the_first_load_are_in_the_verdict(tmp_path):
    write_results(tmp_path / "b", gains=[1.2, 1.2, 1.3])
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    results["measurements"][0]["failed_requests"]["original"] = 1
    for metric in results["measurements"][0]["metrics"].values():
        metric |= {"gain": None, "ratio": None, "verdict": None}
    (tmp_path / "b" / "results.json").write_text(json.dumps(results))
    assert render_report([tmp_path / "b"], tmp_path / "report.html")["verdict"] == []
    assert "Not comparable" in page_text(tmp_path / "report.html")


class Heard(Say):
    """Keeps what it had no translation for."""

    unknown: ClassVar = set()

    def __call__(self, message, **values):
        if message not in self._table:
            self.unknown.add(message)
        return super().__call__(message, **values)


def test_the_japanese_report_has_no_english_sentence(everything, tmp_path, monkeypatch):
    write_sweep(everything / "sweep")
    monkeypatch.setattr(report, "Say", Heard)
    Heard.unknown.clear()
    render_report([everything], tmp_path / "report.html", language="ja")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<html lang="ja">' in page
    assert "元モデル比 1.21 倍" in page
    assert "リクエストの 90 % 以上がすべての SLO を満たした" in page
    # Nor what shows under the mouse.
    hovers = re.findall(r'"hover(?:text|template)":(\[.*?\]|".*?")', page)
    assert len(hovers) > 20 and not [each for each in hovers if re.search(r"[A-Za-z]{3,} [a-z]{3,}", each)]
    # What the files of this test hold in words of their own.
    assert Heard.unknown == {"counted", "bytes", "paired"}


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_failed_attempts_and_limits_that_were_not_met_are_said(tmp_path, name):
    write_sweep(tmp_path / "sweep")
    file = tmp_path / "sweep" / "results.json"
    results = json.loads(file.read_text())
    results["failed_attempts"] = [{"repeat": 1, "load": 0, "side": "pruned", "failed": 4, "error": "It died."}]
    results["goodput"]["metrics"]["max_request_rate"] |= {"gain": None, "verdict": None}
    results["goodput"]["metrics"]["max_request_rate"]["pruned"] = {"median": None, "values": [3.0, 0.0, 3.0]}
    file.write_text(json.dumps(results))
    render_report([tmp_path / "sweep"], tmp_path / name)
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert "pruned model failed in repeat 2 and was made again; its 4 requests are in no figure." in text
    assert "Not even the lowest rate tried met them in every repeat: pruned." in text
    assert "count as failed" not in text
    assert name == "report.html" or not re.search(r"\n\n\n\n", text)


@pytest.mark.parametrize(("language", "says"), [("en", "1.21x the speed"), ("ja", "元モデル比 1.21 倍")])
def test_markdown(everything, tmp_path, language, says):
    write_sweep(everything / "sweep")
    write_evaluation(everything, text="a | b.txt")
    render_report([everything], tmp_path / "report.md", language=language)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert says in text
    assert "| a \\| b.txt |" in text
    assert "<" not in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    for table in tables:
        lines = [re.sub(r"\\\|", "", line).count("|") for line in table.splitlines()]
        assert len(set(lines)) == 1, table
    assert len(tables) >= 5
    assert not re.search(r"\n\n\n\n", text)


def test_values_from_files_are_escaped(everything, tmp_path):
    evil = '<img src=x onerror="alert(1)"></script><b>'
    write_plan(everything, name=evil)
    write_summary(everything, name=evil)
    write_evaluation(everything, text=evil)
    render_report([everything], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert evil not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


def test_parts_that_are_missing_are_said_to_be_missing(tmp_path):
    write_summary(tmp_path / "only")
    summary = render_report([tmp_path / "only"], tmp_path / "report.html")
    text = page_text(tmp_path / "report.html")
    assert summary["missing"] == ["plan.json", "evaluation.json", "verification.json", "results.json"]
    assert summary["verdict"] == []
    assert "nothing was measured, so nothing is claimed" in text
    assert "There is no plan.json" in text
    assert "On the very text the pruning was decided with" in text


def test_a_failed_verification_shows(tmp_path):
    write_verification(tmp_path / "a")
    write_verification(tmp_path / "b", passed=False)
    render_report([tmp_path], tmp_path / "report.html")
    text = page_text(tmp_path / "report.html")
    assert "Failed" in text
    assert "1 of 2 within" in text


def test_bad_input(everything, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SenteiError, match="Nothing to report"):
        render_report([empty], tmp_path / "report.html")
    with pytest.raises(SenteiError, match="does not exist"):
        render_report([tmp_path / "none"], tmp_path / "report.html")
    (empty / "results.json").write_text("{")
    with pytest.raises(SenteiError, match="not readable JSON"):
        render_report([empty], tmp_path / "report.html")
    (empty / "results.json").write_text('{"schema_version": 9}')
    with pytest.raises(SenteiError, match="schema_version is 9"):
        render_report([empty], tmp_path / "report.html")
    (empty / "results.json").write_text('{"schema_version": 1}')
    with pytest.raises(SenteiError, match=r"results\.json does not have the fields"):
        render_report([empty], tmp_path / "report.html")
    with pytest.raises(SenteiError, match="neither HTML nor Markdown"):
        render_report([everything], tmp_path / "report.pdf")
    assert not list(tmp_path.glob("report.*"))
    write_plan(empty, name="another")
    with pytest.raises(SenteiError, match="differ"):
        render_report([everything, empty], tmp_path / "report.html")


def test_an_existing_report_is_kept_unless_forced(everything, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(SenteiError, match="exists"):
        render_report([everything], out)
    assert out.read_text() == "mine"
    render_report([everything], out, force=True)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_place_that_cannot_be_written_is_said(everything, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(sentei("report", everything, "-o", tmp_path / "file" / "report.html"), "file, which is a file")


def test_copies_are_shown_once(everything, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("plan.json", "plan.safetensors", "pruning_summary.json"):
        (copy / name).write_bytes((everything / name).read_bytes())
    assert render_report([everything, everything, copy], tmp_path / "r.html")["missing"] == []


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.25), (0.9, 1.3), (0.3, 12), (0.02, 2), (0.0009, 2006)])
def test_ratios_have_few_ticks_and_1_is_one_of_them(low, high):
    ticks = _ratio_ticks(low, high)
    assert 1.0 in ticks
    assert 4 <= len(ticks) <= 9
    assert ticks[0] <= low < high <= ticks[-1]


def test_numbers_for_people():
    assert [format_bytes(n) for n in (999, 1_500, 269_030_016)] == ["999 B", "1.5 kB", "269 MB"]
    assert [format_count(n) for n in (7, 134_515_008, 8_030_000_000)] == ["7", "134.5M", "8.03B"]
    assert [format_ratio(r) for r in (0.00451, 0.95, 1.234, 292.34)] == ["0.0045", "0.95", "1.23", "292"]
    assert [format_change(r) for r in (0.8, 1.0, 1.256, 2.5)] == ["−20.0 %", "±0 %", "+25.6 %", "+150 %"]


@pytest.mark.parametrize(
    "low, high, verdict, colour", [(0.995, 1.011, "no difference shown", "open"), (1.01, 1.05, "worse", "bad")]
)
def test_only_damage_beyond_chance_is_red(tmp_path, low, high, verdict, colour):
    write_evaluation(tmp_path / "run")
    file = tmp_path / "run" / "evaluation.json"
    content = json.loads(file.read_text())
    for entry in content["evaluations"]:
        entry["perplexity"] = 20.0 if entry["model"] == "original" else 20.06
    content["text_comparisons"] = [{
        "text": content["evaluations"][0]["text"], "worst_passages": [],
        "perplexity_ratio": {"value": 1.003, "low": low, "high": high, "p_value": 0.4, "test": "t", "verdict": verdict},
    }]  # fmt: skip
    file.write_text(json.dumps(content))
    for name in ("report.html", "report.md"):
        render_report([tmp_path / "run"], tmp_path / name)
    page = page_text(tmp_path / "report.html")
    card = page[page.rindex('<div class="card', 0, page.index("Perplexity, lower is better")) :]
    assert card.startswith(f'<div class="card {colour}">')
    said = f"the 95 % interval of the ratio, {low:.3f}x to {high:.3f}x, contains 1"
    assert (said in (tmp_path / "report.md").read_text(encoding="utf-8")) == (colour == "open")


def test_a_rise_within_the_standard_errors_is_not_red_either(tmp_path):
    """Evaluations from before there was a paired test."""
    write_evaluation(tmp_path / "run")
    file = tmp_path / "run" / "evaluation.json"
    content = json.loads(file.read_text())
    for entry in content["evaluations"]:
        entry |= {"perplexity": 20.0 if entry["model"] == "original" else 20.3, "standard_error": 0.4}
    content.pop("text_comparisons", None)
    file.write_text(json.dumps(content))
    render_report([tmp_path / "run"], tmp_path / "report.html")
    page = page_text(tmp_path / "report.html")
    assert '<div class="card open">\n<p class="what">Perplexity, lower is better' in page


def test_a_gap_is_said_with_the_share_of_each_cause(tmp_path):
    write_results(tmp_path / "b", gains=[1.1, 1.11, 1.12])
    file = tmp_path / "b" / "results.json"
    results = json.loads(file.read_text())
    values = {"tpot": "4.76", "least": "3.1", "gain": "1.17"}
    results["measurements"][0]["gap"] = {
        "metric": "output_throughput", "expected": 1.25, "measured": 1.11, "low": 1.08, "high": 1.14,
        "direction": "below", "unexplained": 0.27,
        "causes": [{"cause": "overhead", "share": 0.73, "message": OVERHEAD, "values": values, "text": "..."}],
    }  # fmt: skip
    file.write_text(json.dumps(results))
    for language, said in (("en", ("4.76 ms a token", "unexplained")), ("ja", ("4.76 ms のうち", "説明できない分"))):
        render_report([tmp_path / "b"], tmp_path / f"{language}.html", language=language)
        text = page_text(tmp_path / f"{language}.html")
        for expected in (*said, "73 %", "27 %"):
            assert expected in text


def test_a_rate_by_the_rule_that_let_half_pass_is_marked(tmp_path):
    write_sweep(tmp_path / "sweep")
    file = tmp_path / "sweep" / "results.json"
    results = json.loads(file.read_text())
    render_report([tmp_path / "sweep"], tmp_path / "new.html")
    assert "answered half of what arrived" not in page_text(tmp_path / "new.html")
    results["goodput"]["metrics"]["max_request_rate"]["formula"] = FORMER_FORMULAS[0]
    file.write_text(json.dumps(results))
    render_report([tmp_path / "sweep"], tmp_path / "old.html")
    assert "answered half of what arrived" in page_text(tmp_path / "old.html")
