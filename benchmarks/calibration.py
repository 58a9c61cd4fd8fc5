"""What calibration text leaves of the demo model: perplexity after pruning by mixture and by number of windows.

    python benchmarks/calibration.py -o calibration.json --mixture english=c4.jsonl --samples 4,8,16,32,64,128 \
        --methods 2ssp,sentei --text c4=more.jsonl --text wikitext2=wiki.txt
    python benchmarks/calibration.py -o languages.json --mixture english=c4.jsonl --mixture half=1:c4.jsonl,1:ja.txt \
        --samples 32 --text c4=more.jsonl --text japanese=other-ja.txt

A row that stands in the output file already is not computed again. Results stand in ``benchmarks/results/``.
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
from toolchain.errors import SenteiError
from toolchain.metrics.perplexity import perplexity
from toolchain.model.disk_layers import open_walk
from toolchain.model.gguf import demo_gguf, import_gguf
from toolchain.model.loading import bos_of, load_tokenizer
from toolchain.outputs import write_text
from toolchain.plan.plan import PruningPlan, load_plan
from toolchain.prune.methods import METHODS
from toolchain.prune.pipeline import prune
from toolchain.prune.settings import PruneSettings
from toolchain.text.sources import TextSource, parse_sources, parse_text
from toolchain.text.windows import load_windows


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write, or to go on with.")],
    mixture: Annotated[list[str], typer.Option(metavar="NAME=[WEIGHT:]TEXT,...", help="To prune with; several times.")],
    text: Annotated[list[str], typer.Option(metavar="NAME=TEXT", help="To evaluate on; several times.")],
    methods: Annotated[str, typer.Option(help="As compare-methods names them, comma-separated.")] = "sentei",
    samples: Annotated[str, typer.Option(help="Calibration windows, comma-separated.")] = "32",
    sparsity: Annotated[float, typer.Option(help="Of the decoder blocks.")] = 0.25,
    windows: Annotated[int, typer.Option(help="Windows of each text to evaluate on.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    model: Annotated[Path | None, typer.Option(help="A model directory; without it, the demo model.")] = None,
) -> None:
    """Prunes and evaluates by every method with every mixture at every number of windows."""
    mixtures = {name: parse_sources(given.split(",")) for name, given in (each.split("=", 1) for each in mixture)}
    texts = dict(each.split("=", 1) for each in text)
    settings = {
        "sparsity": sparsity, "num_windows": windows, "seq_len": seq_len, "dtype": dtype,
        "texts": {name: Path(path).name for name, path in texts.items()},
    }  # fmt: skip
    rows = _rows_of(out, settings)
    with tempfile.TemporaryDirectory() as temporary:
        if model is None:
            model = Path(temporary) / "model"
            import_gguf(demo_gguf(), model)
        tokenizer = load_tokenizer(model)
        bos = bos_of(open_checkpoint(model).family, tokenizer)
        ids = {
            name: load_windows(parse_text(path), tokenizer, num_samples=windows, seq_len=seq_len, bos=bos).ids
            for name, path in texts.items()
        }
        asked = [
            ("original", "", 0, ()),
            *(
                (method, name, int(count), sources)
                for method, (name, sources), count in itertools.product(
                    methods.split(","), mixtures.items(), samples.split(",")
                )
            ),
        ]
        for method, name, count, sources in asked:
            row: dict[str, Any] = {"method": method, "mixture": name, "num_calibration_windows": count}
            if any(row.items() <= done.items() for done in rows):
                continue
            started = time.monotonic()
            evaluated = model
            if count:
                evaluated = Path(temporary) / "pruned"
                plan = _prune(model, evaluated, method, sources, count, settings)
                row["sources"] = [each.model_dump() for each in plan.document.calibration.sources]
                row["removed_attention"] = list(plan.removed_attention)
                row["intermediate_size"] = [layer.intermediate_size for layer in plan.layout]
                row["num_block_parameters"] = plan.steps[-1].num_block_parameters
            row["perplexity"] = _perplexities(evaluated, ids, dtype)
            row["seconds"] = round(time.monotonic() - started, 1)
            rows.append(row)
            _save(out, settings, rows)
            said = ("method", "mixture", "num_calibration_windows", "perplexity", "seconds")
            typer.echo(json.dumps({key: row[key] for key in said}), err=True)
    _show(rows, list(texts))


def _rows_of(out: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    document = json.loads(out.read_text(encoding="utf-8"))
    if document["settings"] != settings:
        raise SenteiError(f"{out} was measured with other settings.", "Choose another file.")
    return document["rows"]


def _prune(
    model: Path, out: Path, method: str, sources: tuple[TextSource, ...], count: int, settings: Mapping[str, Any]
) -> PruningPlan:
    pruning = PruneSettings(
        sparsity=settings["sparsity"],
        calibration=sources,
        num_samples=count,
        seq_len=settings["seq_len"],
        align=1,
        attention_removals=None,
        device="cpu",
        dtype=getattr(torch, settings["dtype"]),
        seed=0,
        **METHODS[method].settings,
    )
    prune(model, out, pruning, model_name="demo", force=True)
    return load_plan(out)


def _perplexities(model: Path, ids: Mapping[str, torch.Tensor], dtype: str) -> dict[str, dict[str, float | None]]:
    walk = open_walk(open_checkpoint(model), dtype=getattr(torch, dtype), device="cpu", offload=False)
    measured = {name: perplexity(walk, windows) for name, windows in ids.items()}
    return {name: {"value": each.perplexity, "standard_error": each.standard_error} for name, each in measured.items()}


def _save(out: Path, settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    result = {
        "schema_version": 1,
        "kind": "calibration_benchmark",
        "settings": settings,
        "rows": rows,
        "environment": describe_environment(),
    }
    write_text(out, json.dumps(result, indent=1) + "\n")


def _show(rows: list[dict[str, Any]], texts: list[str]) -> None:
    table = Table(box=None)
    for header in ("method", "mixture", "windows", "attentions", *texts):
        table.add_column(header, justify="left" if header in ("method", "mixture") else "right")
    for row in rows:
        table.add_row(
            row["method"],
            row["mixture"],
            str(row["num_calibration_windows"] or ""),
            ", ".join(map(str, row.get("removed_attention", []))),
            *(f"{row['perplexity'][name]['value']:.2f}" for name in texts),
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
