"""What the demo says of the plan that it made."""

import json

from tests.command_line import sentei
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.cli.commands import demo


def test_both_stages_are_told_step_by_step(pico_model, text, tmp_path):
    done = sentei(
        "prune", pico_model, "-o", tmp_path / "pruned", "--sparsity", 0.4, "--attention-removals", 2, "--align", 1,
        "--calibration", text, "--samples", 4, "--seq-len", 32, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    original, neurons, first, second, refitted = demo._steps(tmp_path / "pruned", summary)
    num_layers = len(open_checkpoint(pico_model).layout)
    assert [step["kv_cache"] for step in (original, neurons)] == [1, 1]
    assert [first["kv_cache"], second["kv_cache"]] == [1 - 1 / num_layers, 1 - 2 / num_layers]
    assert 0 == original["sparsity"] < neurons["sparsity"] < first["sparsity"] < second["sparsity"]
    assert second["sparsity"] == refitted["sparsity"] == summary["sparsity"]
    assert {int(step["label"].split()[1]) for step in (first, second)} == set(summary["removed_attention"])
    assert refitted["perplexity"] == summary["calibration_metric"]["pruned"]
    lines = demo._step_lines([original, neurons, first, second, refitted])
    assert len({line.index("KV cache") for line in lines}) == 1
