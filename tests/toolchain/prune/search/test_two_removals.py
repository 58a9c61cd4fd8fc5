"""Where no attention is removed, KV cache gains nothing: summary, card and report say so, and what two would cost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from serving.forecast.model_facts import checkpoint_facts
from serving.report.render import render_report
from tests.toolchain.prune.conftest import SEQ_LEN
from tests.toolchain.prune.test_within_limit import settings
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.model.loading import load_model
from toolchain.plan.plan import load_plan
from toolchain.prune.apply import apply_plan
from toolchain.prune.budget.allocation import block_parameters
from toolchain.prune.pipeline import prune
from toolchain.prune.search.two_removals import widths_with_removals

# So little that the formula removes no attention of the pico model.
SPARSITY = 0.2


def pruned(worded_model: Path, out: Path, **others: Any) -> dict[str, Any]:
    asked = settings(worded_model, limit=None, sparsity=SPARSITY, attention_removals=None, num_samples=4)
    return prune(worded_model, out, replace(asked, **others), model_name="tiny")


@torch.inference_mode()
def perplexity(worded_model: Path, directory: Path) -> float:
    """On the first window, by the model as it loads."""
    ids = torch.tensor([[int(word[1:]) for word in (worded_model / "text.txt").read_text().split()[:SEQ_LEN]]])
    logits = load_model(directory, dtype=torch.float32)(ids).logits
    return float(cross_entropy(logits[0, :-1], ids[0, 1:]).exp())


def test_what_two_removals_would_cost_and_gain_is_true(worded_model: Path, tmp_path: Path):
    summary = pruned(worded_model, tmp_path / "out", compensate=False)
    found = summary["two_removals"]
    plan = load_plan(tmp_path / "out")
    assert not plan.removed_attention
    assert found["metric"] == "perplexity"
    assert found["metric_without_removals"] == pytest.approx(perplexity(worded_model, tmp_path / "out"), rel=1e-5)

    # FFNs are wider by what two attentions weigh. Such a plan, made by hand, is weighed and measured by others' code.
    document, layers = plan.document, set(found["layers"])
    sizes = block_parameters(open_checkpoint(worded_model))
    widths = widths_with_removals(sizes, plan)
    pairs = zip(widths, document.target_intermediate_size, strict=True)
    assert all(48 >= wide >= narrow and (wide - narrow) % document.align == 0 for wide, narrow in pairs)
    by_hand = [
        layer.model_copy(update={"intermediate_size": widths[number], "attention": attention})
        for number, layer in enumerate(document.layers)
        for attention in ["remove" if number in layers else "keep"]
    ]
    applied = apply_plan(plan.changed({"layers": by_hand}), worded_model, tmp_path / "by-hand")
    fewer = summary["pruned"]["num_block_parameters"] - applied["pruned"]["num_block_parameters"]
    assert 0 <= fewer < document.align * sizes.neuron
    assert len(applied["removed_attention"]) == 2
    assert found["metric_with_removals"] == pytest.approx(perplexity(worded_model, tmp_path / "by-hand"), rel=1e-5)
    for how, directory in (("without", tmp_path / "out"), ("with", tmp_path / "by-hand")):
        facts = checkpoint_facts(directory, None)
        assert found[f"kv_bytes_per_token_{how}_removals"] == facts.kv_bytes_per_token
        assert found[f"decode_weight_bytes_{how}_removals"] == facts.decode_weight_bytes


def test_it_is_said_on_the_card_and_in_the_report(worded_model: Path, tmp_path: Path):
    found = pruned(worded_model, tmp_path / "out")["two_removals"]
    before, after = (found[f"metric_{how}_removals"] for how in ("without", "with"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no attention was removed: the KV cache takes 512 bytes per token, as the original's." in card
    assert "With --attention-removals 2, at about the same sparsity: 256 bytes per token (-50.0%)" in card
    assert f"perplexity {before:.4g} → {after:.4g} before compensation" in card
    for suffix, language, words in (
        (".md", "en", "With --attention-removals 2"),
        (".html", "ja", "KV キャッシュは元の"),
    ):
        render_report([tmp_path / "out"], tmp_path / f"report{suffix}", language=language)
        report = (tmp_path / f"report{suffix}").read_text()
        assert words in report
        assert f"{after:.4g}" in report


@pytest.mark.parametrize(
    "asked",
    [
        {"attention_removals": 0},
        {"attention_removals": 1, "sparsity": 0.3},
        {"method": "shortgpt", "compensate": False, "sparsity": 0.25},
    ],
    ids=["asked-for", "removed", "blocks"],
)
def test_it_is_not_measured_where_it_says_nothing_new(worded_model: Path, tmp_path: Path, asked: dict[str, Any]):
    asked = {"compensate": False, "widths": "uniform", "num_samples": 1, **asked}
    assert pruned(worded_model, tmp_path / "out", **asked)["two_removals"] is None
