"""What the ways to split a sparsity budget leave of the demo model: perplexity on text not calibrated with.

Every allocation (``formula``, ``auto``) with every kind of FFN widths (``uniform``, ``ranked``), at several sparsities.

    python benchmarks/allocation.py -o allocation.json --calibration c4.jsonl --text c4=more.jsonl --text wiki=w.txt

Results stand in ``benchmarks/results/``.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from serving.benchmark.environment import describe_environment
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.metrics.perplexity import perplexity
from toolchain.model.gguf import demo_gguf, import_gguf
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.outputs import write_text
from toolchain.plan.plan import PruningPlan, load_sweep
from toolchain.prune.apply import remove_planned
from toolchain.prune.settings import PruneSettings
from toolchain.prune.sweep import sweep
from toolchain.text.sources import TextSource
from toolchain.text.windows import load_windows


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    calibration: Annotated[Path, typer.Option(help="Text to prune with.")],
    text: Annotated[list[str], typer.Option(metavar="NAME=PATH", help="Text to evaluate on; several times.")],
    sparsity: Annotated[list[float], typer.Option(help="Of the decoder blocks; several times.")] = [0.25, 0.375, 0.5],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 8,
    windows: Annotated[int, typer.Option(help="Windows of each text to evaluate on.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    search: Annotated[str, typer.Option(help="exact or racing.")] = "exact",
) -> None:
    """Prunes and evaluates every combination."""
    texts = dict(each.split("=", 1) for each in text)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        import_gguf(demo_gguf(), directory / "model")
        tokenizer = load_tokenizer(directory / "model")
        ids = {
            name: load_windows(Path(path), tokenizer, num_samples=windows, seq_len=seq_len).ids
            for name, path in texts.items()
        }
        walk = LayerWalk(
            load_model(directory / "model", dtype=torch.float32), open_checkpoint(directory / "model").family
        )
        rows: list[dict[str, Any]] = [{"method": "original", **_perplexities(walk, ids)}]
        for allocation, widths in itertools.product(("formula", "auto"), ("uniform", "ranked")):
            settings = PruneSettings(
                sparsity=sparsity[0],
                calibration=[TextSource(calibration)],
                num_samples=samples,
                seq_len=seq_len,
                align=64,
                attention_removals=None,
                device="cpu",
                dtype=torch.float32,
                seed=0,
                allocation=allocation,
                widths=widths,
                search=search,
            )
            started = time.monotonic()
            plans_at = directory / f"{allocation}-{widths}"
            sweep(directory / "model", plans_at, settings, sparsity, model_name="demo")
            seconds = time.monotonic() - started
            for plan in (load_sweep(plans_at) or {}).values():
                rows.append(
                    {
                        "method": f"{allocation}, {widths}",
                        "target_sparsity": plan.document.target_sparsity,
                        "num_block_parameters": plan.steps[-1].num_block_parameters,
                        "removed_attention": list(plan.removed_attention),
                        "intermediate_size": [layer.intermediate_size for layer in plan.document.layers],
                        **_perplexities(_pruned(directory / "model", plan), ids),
                        "seconds_for_all_sparsities": seconds,
                    }
                )
                typer.echo(json.dumps({k: v for k, v in rows[-1].items() if k != "intermediate_size"}), err=True)
    result = {
        "schema_version": 1,
        "kind": "allocation_benchmark",
        "calibration": calibration.name,
        "texts": {name: Path(path).name for name, path in texts.items()},
        "num_windows": windows,
        "num_calibration_windows": samples,
        "seq_len": seq_len,
        "search": search,
        "align": 64,
        "rows": rows,
        "environment": describe_environment(),
    }
    write_text(out, json.dumps(result, indent=2) + "\n")
    _show(rows, list(texts))


def _perplexities(walk: LayerWalk, ids: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: perplexity(walk, windows).perplexity for name, windows in ids.items()}


def _pruned(directory: Path, plan: PruningPlan) -> LayerWalk:
    walk = LayerWalk(load_model(directory, dtype=torch.float32), open_checkpoint(directory).family)
    remove_planned(walk, plan)
    return walk


def _show(rows: list[dict[str, Any]], texts: list[str]) -> None:
    table = Table(box=None)
    for header in ("method", "sparsity", "attentions", "widths", *texts):
        table.add_column(header, justify="left" if header == "method" else "right")
    for row in rows:
        widths = row.get("intermediate_size", [])
        table.add_row(
            row["method"],
            f"{row['target_sparsity']:.1%}" if "target_sparsity" in row else "",
            str(len(row.get("removed_attention", []))),
            f"{min(widths)}-{max(widths)}" if widths else "",
            *(f"{row[name]:.2f}" for name in texts),
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
