"""The way through a proof of concept: nothing is done twice, nothing is measured that may not be deployed anyway."""

import json

import pytest

from serving.decision.document import VerdictDocument
from serving.poc.measured import gain_metric
from serving.poc.run import decided
from serving.poc.run_steps import Outcome
from serving.poc.walk import TOO_DAMAGED, Walk, expected_steps
from tests.serving.poc.world import ORIGINAL, TEXT, Truth, World, steps_of
from toolchain.errors import SenteiError


def concluded(directory, world: World, **changed) -> VerdictDocument:
    steps = steps_of(directory, **changed)
    walk = Walk(steps=steps, siblings={}, do=world)
    candidates = walk.candidates()
    return decided(steps.poc, "own", walk.original(), candidates, gain_metric(walk.results))


LESS = {"12.5 %": Truth(loss=1.02, gain=1.12), "25 %": Truth(loss=1.08, gain=1.28)}


def test_small_first_until_a_guard_rail_breaks_and_every_step_once(tmp_path):
    world = World(truths=LESS | {"37.5 %": Truth(loss=1.4)})
    found = concluded(tmp_path, world)
    assert (found.decision, found.candidate) == ("deploy", "25 %")
    assert world.done == [
        "evaluate original", "plans",
        "prune 12.5 %", "evaluate 12.5 %", "export 12.5 %", "export original", "benchmark 12.5 %",
        "prune 25 %", "evaluate 25 %", "export 25 %", "benchmark 25 %",
        "prune 37.5 %", "evaluate 37.5 %",
    ]  # fmt: skip
    assert [each.name for each in found.candidates] == ["12.5 %", "25 %", "37.5 %"]
    assert found.candidates[2].not_measured == TOO_DAMAGED
    # One request at a time is no load that GPUs could be counted by.
    assert [(row.requests_per_s is None, row.gpus) for row in found.capacity] == [(False, None)] * 3
    assert "GPU" not in "".join(each.text for each in found.reasons)


def test_what_will_not_be_run_is_not_waited_for(tmp_path):
    steps = steps_of(tmp_path, alternatives={"pruned_and_quantised": ["int8"]})
    walk = Walk(steps=steps, siblings={}, do=World(truths=LESS | {"25 %": Truth(loss=1.4)}))
    assert walk.possible == [0.125, 0.25, 0.375, 0.5]
    walk.candidates()
    assert walk.possible == [0.125]
    names = [each.name for each in expected_steps(steps, {}, walk.possible)]
    assert "benchmark 12.5 % + int8" in names and not any("25 %" in each and "12.5" not in each for each in names)
    assert expected_steps(steps, {}, [])[-1].name == "export original"


def test_a_groups_floor_stops_what_perplexity_and_the_average_allow(tmp_path):
    hurt = {"25 %": Truth(right={"law": 0.9, "safety": 0.6}), "12.5 %": Truth(gain=1.02)}
    rails = {"most_perplexity": 1.2, "least_gain": 1.1, "least_accuracy": 0.6, "groups": {"safety": 0.8}}
    found = concluded(tmp_path, World(truths=hurt), guard_rails=rails)
    assert (found.decision, found.candidate) == ("do not prune", None)
    told = "\n".join(each.text for each in found.reasons)
    assert "25 %: 60 % of the questions in group safety are answered correctly" in told
    assert "12.5 %: the speed is 1.0" in told
    assert len(found.candidates) == 2


SAFE, HELPFUL = "refusal_rate:unsafe.jsonl#wanted=refusals", "refusal_rate:harmless.jsonl#wanted=answers"


@pytest.mark.parametrize(
    ("refused_unsafe", "refused_harmless", "told"),
    [
        (0.99, 0.01, None),
        # Pruning made it answer what it must refuse.
        (0.80, 0.01, f"{SAFE} is 80 % (95 % interval 78–82 %), and 95 % is the least allowed."),
        # Pruning made it refuse what it must answer.
        (0.99, 0.20, f"{HELPFUL} is 20 % (95 % interval 18–22 %), and 5 % is the most allowed."),
        (0.96, 0.01, f"whether {SAFE} is at least 95 % cannot be told"),
        (0.99, 0.04, f"whether {HELPFUL} is at most 5 % cannot be told"),
    ],
)
def test_refusals_are_kept_where_they_are_wanted_and_few_where_they_are_not(
    refused_unsafe, refused_harmless, told, tmp_path
):
    truth = Truth(gain=1.3, metrics={SAFE: refused_unsafe, HELPFUL: refused_harmless})
    # poc.yaml names the file with its folder, and an evaluation without it.
    limits = {SAFE.replace(":", ":data/"): 0.95, HELPFUL: 0.05}
    rails = {"most_perplexity": 1.2, "least_gain": 1.1, "metrics": limits}
    world = World(truths={"25 %": truth, "25 % + int8": truth})
    found = concluded(
        tmp_path, world, guard_rails=rails, candidates={"sparsities": [0.25]},
        alternatives={"pruned_and_quantised": ["int8"]},
    )  # fmt: skip
    if told is None:
        assert found.decision == "deploy"
        assert "benchmark 25 % + int8" in world.done
        return
    assert (found.decision, found.candidate) == ("do not prune", None)
    assert told in "\n".join(each.text for each in found.reasons)
    # What damages too much is neither exported nor measured.
    assert not any(each.startswith(("export", "benchmark")) for each in world.done)


def test_what_was_not_measured_is_no_green_light(tmp_path):
    rails = {"most_perplexity": 1.2, "least_gain": 1.1, "metrics": {SAFE: 0.95}}
    found = concluded(tmp_path, World(truths={}), guard_rails=rails, candidates={"sparsities": [0.25]})
    assert found.decision == "do not prune"
    assert f"{SAFE} was not measured" in found.reasons[1].text


def test_a_candidate_is_not_deployed_for_what_it_has_read_before(tmp_path):
    world = World(truths={"25 %": Truth(loss=1.02, seen=1.0)})
    found = concluded(tmp_path, world, candidates={"sparsities": [0.25]})
    assert (found.decision, found.candidate) == ("do not prune", None)
    assert "100 % of that text was read in calibration" in found.reasons[1].text
    assert not any(each.startswith(("export", "benchmark")) for each in world.done)


def test_what_was_rounded_with_the_calibration_text_has_read_it_too(tmp_path):
    truths = {"25 %": Truth(seen=0.5), "int4": Truth(loss=1.01, gain=1.9), "int8": Truth(loss=1.01, gain=1.6)}
    found = concluded(
        tmp_path, World(truths=truths), engine="vllm", candidates={"sparsities": [0.25]},
        alternatives={"quantised": ["int4", "int8"]},
    )  # fmt: skip
    assert (found.decision, found.candidate) == ("do not prune", "int8")
    assert {each.name: each.seen for each in found.candidates} == {"25 %": {TEXT: 0.5}, "int4": {TEXT: 0.5}, "int8": {}}


def test_what_was_rounded_after_pruning_has_read_what_its_checkpoint_has(tmp_path):
    world = World(truths={"25 %": Truth(loss=1.08, seen=0.004)})
    rounded = {"pruned_and_quantised": ["int8"]}
    found = concluded(tmp_path, world, alternatives=rounded, candidates={"sparsities": [0.25]})
    assert [each.seen for each in found.candidates] == [{TEXT: 0.004}, {TEXT: 0.004}]


def test_the_steps_ask_for_what_the_guard_rails_judge(tmp_path):
    steps = steps_of(tmp_path, guard_rails={"most_perplexity": 1.2, "metrics": {SAFE: 0.95, HELPFUL: 0.05}})
    words = steps.evaluated_original.arguments
    assert [words[n + 1] for n, word in enumerate(words) if word == "--metric"] == [SAFE, HELPFUL]
    export = steps.exported("int8", steps.model, None, "int8")[0]
    assert json.loads(steps.asked_in_engine("int8", export).arguments[0])["metrics"] == [SAFE, HELPFUL]


def test_a_rounded_original_that_beats_the_pruned_models_is_said_to(tmp_path):
    world = World(truths=LESS | {"int8": Truth(loss=1.01, gain=1.6, memory_bytes=300_000_000)})
    found = concluded(tmp_path, world, alternatives={"quantised": ["int8"]}, candidates={"sparsities": [0.125, 0.25]})
    assert (found.decision, found.candidate) == ("do not prune", "int8")
    by_name = {each.name: each for each in found.candidates}
    assert by_name["25 %"].better == ["int8"] and by_name["int8"].better == []


def test_memory_that_was_not_measured_is_no_green_light(tmp_path):
    """ONNX Runtime on a GPU takes more than weights and KV cache, and nobody knows how much."""
    rails = {"most_perplexity": 1.2, "least_gain": 1.1, "most_memory_gb": 1000}
    world = World(truths={"25 %": Truth(memory_bytes=None)})
    found = concluded(tmp_path, world, guard_rails=rails, candidates={"sparsities": [0.25]})
    assert (found.decision, found.candidate) == ("do not prune", None)
    assert "25 %: the memory was not measured. ONNX Runtime's memory is measured on CPUs" in found.reasons[1].text


def test_the_furthest_that_holds_is_the_one_that_is_rounded_too(tmp_path):
    world = World(truths=LESS | {"37.5 %": Truth(loss=1.5)})
    found = concluded(tmp_path, world, alternatives={"pruned_and_quantised": ["int4"]})
    assert found.candidates[-1].name == "25 % + int4"
    assert (found.decision, found.candidate) == ("deploy", "25 % + int4")


def test_the_same_model_twice_is_not_deployed(tmp_path):
    same = World(truths=dict.fromkeys(("12.5 %", "25 %"), ORIGINAL))
    found = concluded(
        tmp_path, same, guard_rails={"most_perplexity": 1.2}, candidates={"sparsities": [0.125, 0.25]}
    )  # fmt: skip
    assert (found.decision, found.candidate) == ("do not prune", None)


@pytest.mark.parametrize(
    ("step", "outcome", "told"),
    [
        ("prune 25 %", Outcome(error="Memory ran out."), "25 %: perplexity was not measured. Memory ran out."),
        ("evaluate 25 %", Outcome(error="No lm-eval."), "25 %: perplexity was not measured. No lm-eval."),
        ("export 25 %", Outcome(error="It differs.", check_failed=True), "does not give its checkpoint's answers"),
        ("export 25 %", Outcome(error="Disk full."), "25 %: the speed was not measured. Disk full."),
        ("benchmark 25 %", Outcome(error="It hung."), "25 %: the speed was not measured. It hung."),
        ("benchmark 25 %", Outcome(error="It died.", check_failed=True), "25 %: the speed was not measured. It died."),
    ],
)
def test_a_candidate_whose_step_failed_is_not_deployed_and_says_why(step, outcome, told, tmp_path):
    world = World(truths=LESS, failing={step: outcome})
    found = concluded(tmp_path, world, candidates={"sparsities": [0.25]})
    assert (found.decision, found.candidate) == ("do not prune", None)
    assert told in "\n".join(each.text for each in found.reasons)


@pytest.mark.parametrize("step", ["evaluate original", "plans", "export original"])
def test_without_the_original_there_is_no_verdict(step, tmp_path):
    with pytest.raises(SenteiError, match="Memory ran out"):
        concluded(tmp_path, World(truths=LESS, failing={step: Outcome(error="Memory ran out.")}))


def test_bisection_prunes_between_what_holds_and_what_breaks(tmp_path):
    world = World(truths=LESS | {"37.5 %": Truth(loss=1.4), "31.2 %": Truth(loss=1.15, gain=1.5)})
    found = concluded(tmp_path, world, candidates={"bisect": 1})
    assert [each.name for each in found.candidates] == ["12.5 %", "25 %", "31.2 %", "37.5 %"]
    assert found.candidate == "31.2 %"


def test_a_sibling_takes_the_way_of_a_candidate(tmp_path):
    steps = steps_of(tmp_path, candidates={"sparsities": [0.25]})
    world = World(truths=LESS | {"small": Truth(loss=1.03, gain=2.0)})
    siblings = {"small": tmp_path / "small"}
    walk = Walk(steps=steps, siblings=siblings, do=world)
    candidates = walk.candidates()
    assert [each.name for each in candidates] == ["25 %", "small"]
    assert decided(steps.poc, "own", walk.original(), candidates, "output_throughput").candidate == "small"
    # A dry run says the same steps.
    assert sorted(world.done) == sorted(each.name for each in expected_steps(steps, siblings, [0.25]))


def test_commands_get_what_the_file_says(tmp_path):
    limits = {"ttft_ms": 500, "attainment": 0.95}
    steps = steps_of(tmp_path, workload={"input_len": 8, "output_len": 4, "limits": limits}, engine="vllm")
    export, verify = steps.exported("25 %", tmp_path / "models" / "0.25", None)
    assert export.arguments[:2] == ("export", "vllm") and verify.arguments[-2:] == ("--engine", "vllm")
    measured = steps.measured("25 %", None, export).arguments
    assert measured[-4:-2] == ("--slo", "ttft=500") and measured[-1] == "0.95"
    assert measured[1] == "/models/own"
    [rounded, _] = steps.exported("int4", steps.model, None, "int4")
    assert rounded.arguments[:4] == ("quantize", "/models/own", "--scheme", "w4a16")
    assert "--calibration" in rounded.arguments
    assert steps.measured("int4", None, rounded, "int4").arguments[-1] == "--mixed-precision"
    onnx = steps_of(tmp_path, workload={"input_len": 8, "output_len": 4, "limits": limits})
    assert "onnx-server" in onnx.measured("25 %", export, export).arguments
