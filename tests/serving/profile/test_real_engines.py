"""The whole way with real engines, on a model so small that its times say nothing: bytes do."""

import json

import pytest

from tests.command_line import sentei
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.costs.document import read_costs


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.parametrize(
    "engine", [("onnx",), ("vllm", "--engine-option=--enforce-eager", "--engine-option=--max-model-len=128")]
)
def test_a_profile_leads_to_a_plan(wide_model, text, tmp_path, engine):
    costs, out = tmp_path / "costs.json", tmp_path / "out"
    load = ("--input-len", 16, "--output-len", 4, "--concurrency", 2)
    done = sentei("profile", wide_model, "-o", costs, "--engine", *engine, *load)
    assert done.returncode == 0, done.stderr
    assert "each model, predicted by costs fitted to the others, came out within" in done.stdout
    document = read_costs(costs).document
    assert set(document.costs) == {"ttft_ms", "tpot_ms", "ms_per_output_token", "weight_bytes", "kv_bytes_per_token"}
    checkpoint = open_checkpoint(wide_model)
    # An ONNX graph holds rotary tables beside the weights.
    weights = document.predicted("weight_bytes", checkpoint.layout).value
    assert checkpoint.weight_bytes <= weights + 1 < 1.1 * checkpoint.weight_bytes
    kv = document.predicted("kv_bytes_per_token", checkpoint.layout).value
    most = weights - 150_000 + 10 * kv
    done = sentei(
        "prune", wide_model, "-o", out, "--target", f"memory={most / 1e6:.6f}MB@1x10", "--costs", costs,
        "--calibration", text, "--samples", 2, "--seq-len", 64, "--align", 8, "--json", "--no-compensate",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [value] = json.loads(done.stdout)["target"]["rounds"][0]["values"]
    assert value["predicted"] * 2**30 <= most
    pruned = open_checkpoint(out)
    predicted = document.predicted("weight_bytes", pruned.layout).value
    assert weights - predicted == pytest.approx(checkpoint.weight_bytes - pruned.weight_bytes, rel=1e-3)
