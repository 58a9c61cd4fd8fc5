"""Verification passes what is right, and fails for one damaged matrix in any precision."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.onnx_graph import export_onnx
from export.vllm import export_vllm
from serving.engines.transformers import TransformersEngine
from serving.verify import verify as module
from serving.verify.answers import Answers, Differences, answers_of, compare
from serving.verify.judge import judge, limits_from, other_dtype
from serving.verify.reference import CheckpointReference, Computing
from serving.verify.verify import verify
from tests.command_line import refused, sentei
from tests.conftest import prune_by_hand
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.model.disk_layers import open_walk
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import decoder_layers

PROMPTS = [[1, 504, 3575, 282, 4649, 314], [504, 253, 2429, 260]]


@pytest.fixture(autouse=True)
def _a_shorter_long_prompt(request, monkeypatch):
    """The long prompt has 96 tokens, not 1024, where time counts."""
    if request.node.get_closest_marker("acceptance") is None:
        monkeypatch.setattr(module, "_LONGEST_PROMPT", 96)


def open_reference(source, dtype=torch.float32):
    return CheckpointReference(
        open_walk(open_checkpoint(source), dtype=dtype, device="cpu", offload=False), dtype=dtype
    )


def changed(source, directory, change, layer=17):
    """A copy of a checkpoint with one layer's down_proj changed."""
    shutil.copytree(source, directory)
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def damaged(source, directory, factor):
    return changed(source, directory, lambda weight: weight * factor)


def swapped(source, directory):
    """Two neurons of a layer have each other's output."""
    order = torch.arange(1536)
    order[[100, 900]] = order[[900, 100]]
    return changed(source, directory, lambda weight: weight[:, order])


def failed(verdict):
    return {name for name, check in verdict["checks"].items() if not check["passed"]}


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(each, marks=pytest.mark.acceptance) for each in (torch.float32, torch.float16))],
)
def test_a_right_export_passes(pruned_demo, tmp_path, dtype):
    export_vllm(pruned_demo, tmp_path / "out", dtype=dtype)
    verdict = verify(tmp_path / "out", pruned_demo, engine="transformers")
    assert verdict["passed"], failed(verdict)
    assert verdict["dtype"] == str(dtype).removeprefix("torch.")
    assert verdict == json.loads((tmp_path / "out/verification.json").read_text())
    assert verdict["num_prompts"] == 12
    # Who reads "passed" must not think that the server's engine ran it.
    assert (
        "Transformers ran the export, not vLLM" in verdict["not_run"]
        and verdict["not_run"] in (tmp_path / "out/README.md").read_text()
    )
    assert 0 <= verdict["kl_divergence"] < verdict["mean_difference"] + 1e-6
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("## Verification\n\nPassed.") == 1
    assert "| kl divergence |" in card
    # Transformers alone computes in the same way as the reference.
    assert (verdict["mean_difference"] < 1e-4) == (dtype == torch.float32)
    assert 0 < verdict["noise"]["mean_difference"] < 0.5 * verdict["tolerances"]["mean_difference"]


# Layer 17 is the demo model's least sensitive one.
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1.05), pytest.param(torch.bfloat16, 1.5, marks=pytest.mark.acceptance)],
)
def test_one_damaged_matrix_fails_by_its_answers_alone(demo_model, tmp_path, dtype, factor):
    export_vllm(damaged(demo_model, tmp_path / "damaged", factor), tmp_path / "out", dtype=dtype)
    verdict = verify(tmp_path / "out", demo_model, engine="transformers")
    assert not verdict["passed"]
    assert "median_difference" in failed(verdict)
    assert verdict["checks"]["differing_tensors"] == {"passed": False, "value": 1, "limit": 0}


@pytest.fixture(scope="module")
def healthy_demo(demo_model, tmp_path_factory):
    """Without attention in layers 12 and 27, and with narrower FFNs; int4 leaves something of it."""
    directory = tmp_path_factory.mktemp("models") / "healthy"
    directory.mkdir()
    prune_by_hand(demo_model, directory, removed_attention={12, 27}, width=lambda layer: 1536 - 8 * (layer + 1))
    return directory


# What rounding may do is judged over the whole long prompt, whose repetitions an int4 model knows better.
@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(each, marks=pytest.mark.acceptance) for each in ("int8", "int4"))]
)
def test_onnx_passes_when_right(healthy_demo, tmp_path, precision):
    export_onnx(healthy_demo, tmp_path / "out", precision=precision)
    verdict = verify(tmp_path / "out", healthy_demo)
    assert verdict["passed"], failed(verdict)
    assert verdict["engine"] == "onnx"
    assert ("rounding_top1_disagreement" in verdict["checks"]) == (precision != "fp32")
    assert ("rounding_perplexity_ratio" in verdict["checks"]) == (precision != "fp32")


@pytest.mark.acceptance
def test_onnx_fails_when_rounding_ruins_the_model(pruned_demo, tmp_path):
    """Without its first attention the demo model has little left, and int4 takes a third of that."""
    export_onnx(pruned_demo, tmp_path / "out", precision="int4")
    failures = failed(verify(tmp_path / "out", pruned_demo))
    assert "rounding_perplexity_ratio" in failures
    assert failures <= {"rounding_perplexity_ratio", "rounding_top1_disagreement"}


@pytest.mark.parametrize(
    ("precision", "factor"), [("fp32", 1.05), pytest.param("int4", 1.5, marks=pytest.mark.acceptance)]
)
def test_onnx_fails_when_damaged(demo_model, tmp_path, precision, factor):
    export_onnx(damaged(demo_model, tmp_path / "damaged", factor), tmp_path / "out", precision=precision)
    verdict = verify(tmp_path / "out", demo_model)
    assert not verdict["passed"]
    if precision == "int4":
        assert any("layers.17.mlp.down_proj" in check.get("matrix", "") for check in verdict["checks"].values())
    else:
        assert "max_difference" in failed(verdict)


@pytest.mark.acceptance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_neurons_fail(demo_model, tmp_path, dtype):
    export_vllm(swapped(demo_model, tmp_path / "swapped"), tmp_path / "out", dtype=dtype)
    assert "differing_tensors" in failed(verify(tmp_path / "out", demo_model, engine="transformers"))


@pytest.mark.acceptance
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_swapped_neurons_fail_in_onnx(demo_model, tmp_path, precision):
    export_onnx(swapped(demo_model, tmp_path / "swapped"), tmp_path / "out", precision=precision)
    verdict = verify(tmp_path / "out", demo_model)
    assert ({"max_difference"} if precision == "fp32" else {"int8_displacement", "int4_displacement"}) & failed(verdict)
    assert "**Failed**" in (tmp_path / "out/README.md").read_text()


@pytest.mark.acceptance
def test_int4_arithmetic_is_judged_with_the_rounded_matrices(demo_model, tmp_path):
    # The graph computes with other scales than its weights file seems to hold once the file is swapped afterwards.
    export_onnx(demo_model, tmp_path / "out", precision="int4")
    export_onnx(damaged(demo_model, tmp_path / "damaged", 1.01), tmp_path / "near", precision="int4")
    verdict = verify(tmp_path / "near", demo_model)
    assert not {"mean_difference", "median_difference", "greedy_margin"} & failed(verdict)


def test_prompts_from_a_text(pico_model, tmp_path):
    text = tmp_path / "text.txt"
    export_vllm(pico_model, tmp_path / "out")
    text.write_text("too short")
    with pytest.raises(SenteiError, match="too short"):
        verify(tmp_path / "out", pico_model, engine="transformers", text=text)
    text.write_text("The gardener prunes the old trees in winter. " * 100)
    verdict = verify(tmp_path / "out", pico_model, engine="transformers", text=text)
    assert (verdict["passed"], verdict["prompts"]) == (True, "text.txt")
    assert (verdict["num_prompts"], verdict["num_tokens"]) == (8, 512)


def test_another_checkpoint_fails(pico_model, tmp_path):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    prune_by_hand(pico_model, pruned, removed_attention={1}, width=lambda layer: 48)
    verdict = verify(pruned, pico_model, engine="transformers")
    assert verdict["checks"]["differing_tensors"]["value"] == 5
    assert {"differing_tensors", "max_difference"} <= failed(verdict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.acceptance)])
def test_a_broken_cache_shows_in_the_greedy_tokens(demo_model, dtype):
    engine, reference = TransformersEngine(demo_model, dtype=torch.float32), open_reference(demo_model)
    right = Answers(
        log_probabilities=engine.top_log_probabilities(PROMPTS, 5),
        greedy=[engine.generate(prompt, 8) for prompt in PROMPTS],
    )
    # What a model says that sees nothing but the last token.
    forgetful = [tokens[:1] for tokens in right.greedy]
    for tokens in forgetful:
        while len(tokens) < 8:
            tokens += engine.generate(tokens[-1:], 1)
    noisy = answers_of(open_reference(demo_model, dtype), PROMPTS)
    broken = Answers(log_probabilities=right.log_probabilities, greedy=forgetful)
    same, wrong, noise = compare(reference, PROMPTS, right, broken, noisy)
    assert same.max_difference < 1e-3 and wrong.max_difference == same.max_difference
    assert same.greedy_margin < 1e-5
    limits = limits_from(noise, judges_maxima=False)
    assert not judge(wrong, limits)["greedy_margin"]["passed"]
    assert all(check["passed"] for check in judge(same, limits).values())


def test_the_largest_difference_is_one_draw_of_rounding_errors():
    """As measured of a right ONNX export of the demo model without half of its parameters: it is not to be refused."""
    alike = {"kl_divergence": 0, "top1_agreement": 1, "choice_margin": 0, "perplexity_ratio": 1}
    alike |= {"greedy_margin": 0, "greedy_agreement": 1}
    noise = Differences(max_difference=4.64e-4, mean_difference=7.32e-6, median_difference=5.37e-6, **alike)
    right = Differences(max_difference=2.45e-3, mean_difference=8.69e-6, median_difference=5.72e-6, **alike)
    limits = limits_from(noise, judges_maxima=True)
    assert all(check["passed"] for check in judge(right, limits).values())
    # What is wrong at a single position, of a thousand, is seen by nothing else.
    assert not judge(replace(right, max_difference=0.1), limits)["max_difference"]["passed"]


def test_one_sensitive_token_does_not_decide(demo_model):
    engine, prompt = TransformersEngine(demo_model, dtype=torch.float32), PROMPTS[0]
    tokens = engine.generate(prompt, 8)
    tokens[-1] = int(engine.log_probabilities([*prompt, *tokens])[-2].argmin())
    answers = Answers(log_probabilities=engine.top_log_probabilities([prompt], 5), greedy=[tokens])
    [found] = compare(open_reference(demo_model), [prompt], answers)
    assert found.greedy_margin == pytest.approx(1 / 8, abs=1e-5)


def scaled(layer):
    layer.mlp.down_proj.weight.mul_(1.5)


def with_neurons_off_by_one(layer):
    layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight.roll(1, 1))


def with_heads_swapped(layer):
    heads = layer.self_attn.q_proj.weight.view(9, 64, 576)
    heads.copy_(heads[[1, 0, *range(2, 9)]].clone())


def without_attention(layer):
    layer.self_attn.o_proj.weight.zero_()


@pytest.mark.acceptance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("damage", [scaled, with_neurons_off_by_one, with_heads_swapped, without_attention])
@torch.no_grad()
def test_an_engine_that_computes_something_else_fails(demo_model, damage, dtype):
    """What no comparison of files finds: a plugin or a server that does with right weights what is wrong."""
    prompts = module._prompts(open_checkpoint(demo_model), None, long=False)
    noisy = answers_of(open_reference(demo_model, other_dtype(dtype, torch.float32)), prompts)
    engine = open_reference(demo_model, dtype)
    right = answers_of(engine, prompts)
    damage(decoder_layers(engine._walk.model, open_checkpoint(demo_model).family)[10])
    fine, wrong, noise = compare(open_reference(demo_model), prompts, right, answers_of(engine, prompts), noisy)
    limits = limits_from(noise, judges_maxima=dtype == torch.float32)
    assert all(check["passed"] for check in judge(fine, limits).values())
    assert not judge(wrong, limits)["median_difference"]["passed"]


def test_layer_by_layer_is_the_same(pico_model, tmp_path):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    prune_by_hand(pico_model, pruned, removed_attention={0}, width=lambda layer: 40 - layer)
    export_vllm(pruned, tmp_path / "out", dtype=torch.bfloat16)
    whole, layered = (
        verify(tmp_path / "out", pruned, engine="transformers", offload=offload) for offload in (False, True)
    )
    assert whole["passed"] and layered["passed"], failed(whole) | failed(layered)
    assert layered["mean_difference"] == pytest.approx(whole["mean_difference"], rel=1e-3)
    assert layered["noise"]["mean_difference"] == pytest.approx(whole["noise"]["mean_difference"], rel=1e-3)
    assert "no greedy tokens were compared" in layered["not_run"] and "not vLLM" in layered["not_run"]
    assert "greedy_margin" in whole["checks"] and "greedy_margin" not in layered["checks"]


def test_what_does_not_fit_is_run_layer_by_layer(pico_model, tmp_path, monkeypatch):
    export_vllm(pico_model, tmp_path / "out")
    monkeypatch.setattr("serving.verify.reference.available_bytes", lambda device: 10_000)
    assert "layer by layer" in verify(tmp_path / "out", pico_model, engine="transformers")["not_run"]


def test_no_more_than_one_layer_of_the_reference_is_in_memory(demo_model, monkeypatch):
    checkpoint = open_checkpoint(demo_model)
    reference = Computing(dtype=torch.float64, device="cpu", offload=False).open(checkpoint, torch.float64)
    layers, held = decoder_layers(reference._walk.model, checkpoint.family), []
    forward = LayerWalk.run

    def run(walk, module, index, hidden):
        held.append(sum(not weight.is_meta for layer in layers for weight in layer.parameters()))
        return forward(walk, module, index, hidden)

    monkeypatch.setattr(LayerWalk, "run", run)
    found = list(reference.log_probabilities(PROMPTS[:2]))
    assert len(held) == 60 and max(held) == 9  # the weights of one layer
    whole = CheckpointReference(
        open_walk(checkpoint, dtype=torch.float64, device="cpu", offload=False), dtype=torch.float64
    )
    assert all(torch.equal(*pair) for pair in zip(found, whole.log_probabilities(PROMPTS[:2]), strict=True))


def test_rounded_matrices_layer_by_layer(demo_model, wide_model, tmp_path):
    export_onnx(wide_model, tmp_path / "out", precision="int4")
    verdict = verify(tmp_path / "out", wide_model)
    assert {"mean_difference", "median_difference"}.isdisjoint(failed(verdict)), verdict["checks"]
    assert verdict["rounding_mean_difference"] > 2 * verdict["mean_difference"]


@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, "float32"), (torch.float16, "bfloat16")])
def test_a_reference_in_16_bits(pico_model, tmp_path, dtype, noise):
    export_vllm(pico_model, tmp_path / "out", dtype=torch.bfloat16)
    verdict = verify(tmp_path / "out", pico_model, engine="transformers", dtype=dtype)
    assert verdict["passed"], failed(verdict)
    assert (verdict["reference"]["dtype"], verdict["noise"]["dtype"]) == (str(dtype).removeprefix("torch."), noise)


def test_a_model_that_its_dtype_cannot_compute(pico_model, tmp_path):
    large, out = tmp_path / "large", tmp_path / "out"
    shutil.copytree(pico_model, large)
    tensors = load_file(large / "model.safetensors")
    for name in tensors:
        if name.endswith(("up_proj.weight", "down_proj.weight")):
            tensors[name] *= 2e3
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    export_vllm(large, out, dtype=torch.float16)
    with pytest.raises(SenteiError, match="float16, the checkpoint's own answers are not finite"):
        verify(out, large, engine="transformers")


def test_a_device_that_is_not_there(pico_model, tmp_path):
    export_vllm(pico_model, tmp_path / "out")
    before = (tmp_path / "out/verification.json").read_bytes()
    for command in (
        ("verify", tmp_path / "out", "--against", pico_model, "--engine", "transformers"),
        ("export", "vllm", pico_model, "-o", tmp_path / "new"),
        ("export", "nemotron-nas", pico_model, "-o", tmp_path / "new"),
    ):
        refused(sentei(*command, "--device", "cuda:97"), "--device cuda:97")
    assert (tmp_path / "out/verification.json").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_nan_fails():
    assert not module.check_limit(float("nan"), 1.0)["passed"]


def test_engines_that_do_not_fit(pico_model, tmp_path):
    with pytest.raises(SenteiError, match="is no ONNX export"):
        verify(pico_model, pico_model, engine="onnx")
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(SenteiError, match="engine 'vllm' cannot run it"):
        verify(tmp_path, pico_model, engine="vllm")
    with pytest.raises(SenteiError, match=r"sentei_export\.json is missing or damaged"):
        verify(tmp_path, pico_model)
    assert [path.name for path in tmp_path.iterdir()] == ["genai_config.json"]
