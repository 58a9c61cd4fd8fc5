"""The pruned checkpoint's ``README.md``: what was removed and what it cost."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from toolchain.plan.plan import PruningPlan
from toolchain.plan.summary_words import limit_in_words, target_in_words, two_removals_in_words
from toolchain.plan.views import sources_of


def model_card(
    plan: PruningPlan, summary: dict[str, Any], *, licence: Mapping[str, str | list[str]] = MappingProxyType({})
) -> str:
    """Writes the model card.

    Args:
        plan: What was removed.
        summary: The content of ``pruning_summary.json``.
        licence: What the original's card says of its licence, which is the pruned model's too.
    """
    document, damage = plan.document, summary["calibration_metric"]
    method = document.described_method
    original, pruned = summary["original"], summary["pruned"]
    widths = summary["intermediate_size"]
    removed = ", ".join(str(layer) for layer in sorted(summary["removed_attention"])) or "none"
    cost = (
        f"{damage['original']:.2f} → {damage['pruned']:.2f}"
        if damage["pruned"] is not None
        else f"{damage['original']:.2f} before; not measured after (the plan was applied without calibration text)"
    )
    refitted = _compensation(summary)
    kv_cache = f"- **KV cache**: {two_removals_in_words(found)}.\n" if (found := summary.get("two_removals")) else ""
    limit = f"- **Limit**: {limit_in_words(asked)}.\n" if (asked := summary.get("limit")) else ""
    target = "".join(f"- **Target**: {line}.\n" for line in target_in_words(summary.get("target")))
    measured_on = document.metric_source or "the calibration text"
    sources = "; ".join(sources_of(document.calibration))
    again = ", on the same calibration text" if document.compensation else ""
    licensed = "".join(f"{key}: {json.dumps(value)}\n" for key, value in licence.items())
    return f"""---
library_name: transformers
{licensed}tags: [sentei, pruned]
---
# {document.base_model.name}, pruned by {summary["sparsity"]:.1%}

Pruned with sentei {document.sentei_version} ({method}). Sparsity is the fraction of decoder-block parameters
removed; embeddings and head are untouched.

| | original | pruned |
|---|---|---|
| parameters | {original["num_parameters"]:,} | {pruned["num_parameters"]:,} |
| in decoder blocks | {original["num_block_parameters"]:,} | {pruned["num_block_parameters"]:,} |
| weights | {original["weight_bytes"] / 1e6:,.1f} MB | {pruned["weight_bytes"] / 1e6:,.1f} MB |

- **FFN**: `intermediate_size` {document.base_model.intermediate_size} → {min(widths)} to {max(widths)}, layer by layer
  (`per_layer_config` in `config.json`).
- **Attention removed** in layers: {removed}.
{kv_cache}{refitted}- **Cost**: {document.metric} {cost}, on {measured_on}. Measure it on your own text with
  `sentei evaluate`.
{limit}{target}- **Calibration**: {sources}; {document.calibration.num_samples} windows of
  {document.calibration.seq_len} tokens, in {document.dtype}.

## How to load it

Stock Transformers refuses this checkpoint rather than load it wrongly. Where sentei is installed:

- vLLM: `vllm serve DIR`; the plugin registers itself, no `trust_remote_code`.
- Transformers: `toolchain.load_model(Path(DIR))`.

`plan.json` says what was removed from each layer. It can be edited and applied again with `sentei apply`{again}.
"""


def _compensation(summary: dict[str, Any]) -> str:
    """The line about re-fitted weights; empty where none were made."""
    if summary["num_refitted"]:
        return (
            f"- **Compensation**: {summary['num_refitted']} output projections of attentions and FFNs were re-fitted "
            "in closed form\n  on the calibration text, and the norm before the head was scaled; all other weights "
            "are the original's.\n"
        )
    compensation = summary["compensation"]
    if compensation is None or compensation["taken"]:
        return ""
    return (
        "- **Compensation** was tried and not taken: on windows that it was not fitted to, perplexity would have gone "
        f"from\n  {compensation['held_out_perplexity_before']:.2f} to {compensation['held_out_perplexity_after']:.2f}. "
        "All weights are the original's.\n"
    )
