"""The same trained weights in other families' form: the same plan, and the same perplexity."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families import reexpress
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.plan.plan import PruningPlan, load_plan
from toolchain.prune import pipeline
from toolchain.prune.pipeline import prune
from toolchain.prune.settings import PruneSettings
from toolchain.text.embedded import documents

# Of perplexities. A fused product may add up its sums in another order.
TOLERANCE = 1e-4


def pruned(model: Path, out: Path) -> PruningPlan:
    settings = PruneSettings(
        sparsity=0.25,
        calibration=(),
        num_samples=2,
        seq_len=64,
        align=64,
        attention_removals=2,
        device="cpu",
        dtype=torch.float32,
        seed=0,
    )
    prune(model, out, settings, model_name="demo")
    return load_plan(out)


@pytest.fixture(scope="module")
def ids(demo_model: Path) -> torch.Tensor:
    """Text that calibration has not seen."""
    return load_tokenizer(demo_model)(documents()[-1], return_tensors="pt")["input_ids"][:, :256]


def perplexity(directory: Path, ids: torch.Tensor) -> float:
    """By Transformers' own loss."""
    with torch.inference_mode():
        return float(load_model(directory, dtype=torch.float32)(ids, labels=ids).loss.exp())


@pytest.fixture(scope="module")
def as_llama(demo_model: Path, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("pruned") / "llama"
    plan = pruned(demo_model, out)
    return out, plan, perplexity(demo_model, ids), perplexity(out, ids)


@pytest.mark.acceptance
@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3"])
def test_it_prunes_to_the_same_model(
    family: str, demo_model: Path, as_llama, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # By its model_type alone, Transformers gives a Qwen2 model Qwen2's own rules for splitting text.
    monkeypatch.setattr(pipeline, "load_tokenizer", lambda _directory: load_tokenizer(demo_model))
    source, out, (llama, expected, perplexity_before, perplexity_after) = (
        tmp_path / "source",
        tmp_path / "out",
        as_llama,
    )
    reexpress(demo_model, source, family)
    assert open_checkpoint(source).family.model_type == family
    plan = pruned(source, out)
    assert plan.removed_attention == expected.removed_attention
    assert len(plan.removed_attention) == 2
    for ours, theirs in zip(plan.kept_neurons, expected.kept_neurons, strict=True):
        assert np.array_equal(ours, theirs)
    for ours, theirs in zip(plan.document.trace, expected.document.trace, strict=True):
        assert ours.candidates == pytest.approx(theirs.candidates, rel=TOLERANCE)
    assert plan.document.metric_at_end == pytest.approx(expected.document.metric_at_end, rel=TOLERANCE)
    assert perplexity(source, ids) == pytest.approx(perplexity_before, rel=TOLERANCE)
    assert perplexity(out, ids) == pytest.approx(perplexity_after, rel=TOLERANCE)
    assert perplexity_after > perplexity_before * 1.01

    # And the weights are those of the pruned Llama, written in this family's form.
    rewritten = tmp_path / "rewritten"
    reexpress(llama, rewritten, family)
    assert open_checkpoint(rewritten).fingerprint == open_checkpoint(out).fingerprint
