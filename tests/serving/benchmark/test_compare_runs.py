import json
import re
import sys

import pytest

from serving.benchmark.comparison.runs import compare_results
from tests.command_line import refused, sentei
from tests.serving.report.test_render import write_results, write_sweep
from toolchain.errors import MissingDependencyError, SenteiError


def change(directory, **changes):
    file = directory / "results.json"
    content = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = content
        for name in parents:
            target = target[int(name)] if isinstance(target, list) else target[name]
        target[last] = value
    file.write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path):
    for name, gains in (("a", [1.2, 1.22, 1.21]), ("b", [1.3, 1.31, 1.32])):
        write_results(tmp_path / name, gains=gains)
    return tmp_path / "a", tmp_path / "b"


def test_where_requests_failed_nothing_is_compared(runs):
    change(runs[1], measurements__0__failed_requests__pruned=1)
    (load,) = compare_results(*runs)["loads"]
    assert load["metrics"]["output_throughput"]["original"]["verdict"] == "no difference shown"
    assert load["metrics"]["output_throughput"]["pruned"] is None
    assert load["failed_requests"] == {"original": 0, "pruned": 1}


def test_a_faster_day_is_seen_and_what_changed_is_listed(runs):
    change(runs[1], environment__versions__torch="2.14.0")
    result = compare_results(*runs)
    (load,) = result["loads"]
    throughput = load["metrics"]["output_throughput"]
    assert throughput["original"]["verdict"] == "no difference shown"
    assert throughput["pruned_against_original"]["verdict"] == "better"
    assert load["metrics"]["mean_tpot_ms"]["pruned"]["ratio"]["value"] < 1
    assert load["metrics"]["mean_tpot_ms"]["pruned_against_original"]["verdict"] == "better"
    assert result["changed"] == [["environment.versions.torch", "2.13.0", "2.14.0"]]


def test_a_faster_machine_is_no_better_pruning(runs):
    """Both models are 30 % faster on day B: whoever reads that must not take the day for the plan."""
    for name in ("a", "b"):
        write_results(runs[0].parent / name, gains=[1.2, 1.22, 1.21])
    file = runs[1] / "results.json"
    content = json.loads(file.read_text())
    for metric in content["measurements"][0]["metrics"].values():
        faster = 1.3 if metric["better"] == "higher" else 1 / 1.3
        for side in ("original", "pruned"):
            metric[side]["values"] = [faster * value for value in metric[side]["values"]]
    file.write_text(json.dumps(content))
    (load,) = compare_results(*runs)["loads"]
    for metric in load["metrics"].values():
        assert metric["original"]["verdict"] == "better"
        assert metric["pruned"]["verdict"] is None
        assert metric["pruned_against_original"]["ratio"]["value"] == pytest.approx(1.0)
        assert metric["pruned_against_original"]["verdict"] == "no difference shown"
    said = sentei("compare", *runs).stdout
    assert "gain over the original: 1.21x → 1.21x, 1.00" in said
    assert not re.search(r" pruned .*better", said)


def test_a_rate_by_an_older_rule_is_left_out_and_the_rest_compared(searched):
    change(searched[0], goodput__metrics__max_request_rate__formula="at least 50% as many")
    result = compare_results(*searched)
    assert result["goodput_left_out"]
    assert result["loads"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "vllm"}, "engine is 'onnx' in .* and 'vllm'"),
        ({"primary_metric": "mean_ttft_ms"}, "primary_metric"),
        ({"models__original__weights_sha256": "other"}, "originals differ"),
        ({"models__pruned__precision": "int8"}, "pruned model is float32 in A and int8"),
        ({"measurements__0__workload__input_len": 65}, "no load was measured in both"),
        ({"measurements__0__workload__num_prompts": 64}, "no load was measured in both"),
        ({"measurements__0__metrics__mean_tpot_ms__formula": "other"}, "mean_tpot_ms was computed in another way"),
        ({"kind": "evaluation"}, "not a benchmark"),
        ({"schema_version": 9}, "schema_version is 9"),
        ({"models": {}}, "does not have the fields it should"),
    ],
)
def test_what_is_not_comparable_is_refused(runs, changes, message):
    change(runs[1], **changes)
    with pytest.raises(SenteiError, match=message):
        compare_results(*runs)


def test_the_same_original_in_another_place_is_the_same(runs):
    change(runs[1], models__original__name="moved", sizes__weight_bytes__original=3)
    assert ["models.original.name", "original", "moved"] in compare_results(*runs)["changed"]


@pytest.fixture
def searched(tmp_path):
    for name in ("one", "other"):
        write_sweep(tmp_path / name)
    return tmp_path / "one", tmp_path / "other"


def test_the_highest_rates_are_compared(searched):
    change(searched[1], goodput__metrics__max_request_rate__pruned__values=[6.0, 6.0, 6.0])
    goodput = compare_results(*searched)["goodput"]
    assert goodput["metrics"]["max_request_rate"]["pruned"]["ratio"]["value"] == pytest.approx(2.0)
    assert goodput["metrics"]["max_request_rate"]["pruned_against_original"]["verdict"] == "better"
    assert "Highest load with ttft 500 ms, tpot 50 ms: A → B" in sentei("compare", *searched).stdout
    change(searched[1], goodput__metrics__max_request_rate__pruned__values=[6.0, 0.0, 6.0])
    assert compare_results(*searched)["goodput"]["unmet"] == ["pruned"]
    assert "pruned: not met in every repeat" in sentei("compare", *searched).stdout


@pytest.mark.parametrize("changes", [{"goodput": None}, {"goodput__slo_ms__ttft": 100}, {"goodput__attainment": 0.5}])
def test_a_highest_rate_that_cannot_be_compared_is_said_to_be_left_out(searched, changes):
    change(searched[1], **changes)
    result = compare_results(*searched)
    assert (result["goodput"], result["goodput_left_out"]) == (None, True)
    assert "The highest load within limits is left out" in sentei("compare", *searched).stdout


def test_without_scipy_that_is_said(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingDependencyError, match="scipy is not installed"):
        compare_results(*runs)


def test_the_command(runs):
    done = sentei("compare", *runs)
    assert done.returncode == 0
    assert "better" in done.stdout
    assert "(exploratory)" in done.stdout
    refused(sentei("compare", runs[0], runs[0] / "missing.json"), "There is no ")
