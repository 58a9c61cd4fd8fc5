"""What starting vLLM takes against the number of distinct FFN widths: first start, and a start that finds its cache.

    python benchmarks/compile_time.py -o compile_time.json --work /tmp/compile_time

Models of random weights that differ in their layers' widths alone: all have the same number of layers, and within 3 %
as many parameters. Each cell is one start of an engine in a process of its own, from an imported vLLM until it can
answer: ``cold`` with empty directories for what vLLM and torch keep, ``warm`` with what the cold start left there, and
``eager`` with empty directories and without compiling, so that cold less eager is compiling. A change of widths needs a
cold start.

Cells are kept as soon as they are measured, so the same command goes on after whatever ended it. On a CPU vLLM compiles
the model as one graph (its mode ``DYNAMO_TRACE_ONCE``); on a GPU piece by piece, and pieces that are alike share
what was compiled. The result says which. Run it on a machine that does nothing else; with the defaults it is 45 starts,
and ``--repeats 1`` is a third of it. Results stand in ``benchmarks/results/``.
"""

import json
import os
import resource
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from random_checkpoint import generate

from serving.benchmark.environment import describe_environment
from serving.engines.vllm import VllmEngine
from serving.server.vllm.server import has_cxx_compiler
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.model.slicing import write_pruned
from toolchain.outputs import write_text

STARTS = ("cold", "warm", "eager")
# What vLLM counts itself: of whole models (on a CPU), and of pieces (on a GPU).
_COUNTS = (
    "num_aot_compiles", "num_aot_artifacts_saved", "num_aot_artifacts_loaded", "num_inductor_compiles",
    "num_compiled_artifacts_saved", "num_compiled_artifacts_loaded", "num_piecewise_capturable_graphs_seen",
)  # fmt: skip
_FILLED = "filled"  # a start that was killed leaves no such file
_STEP = 64  # neurons between two widths
_PROMPT, _NUM_TOKENS = list(range(100, 116)), 4


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file, gone on with if it exists.")],
    work: Annotated[Path, typer.Option(help="Directory for models and caches.")],
    widths: Annotated[list[int], typer.Option(help="Distinct widths of a model; several times.")] = [1, 2, 4, 8, 16],  # noqa: B006
    layers: Annotated[int, typer.Option(help="Of each model.")] = 16,
    hidden_size: Annotated[int, typer.Option(help="Of each model.")] = 512,
    repeats: Annotated[int, typer.Option(help="Starts of each kind.")] = 3,
) -> None:
    """Starts engines, and writes what each start took."""
    if not has_cxx_compiler():
        raise SystemExit("There is no C++ compiler: nothing can be compiled.")
    if max(widths) > layers:
        raise SystemExit(f"{max(widths)} widths need as many layers, and --layers is {layers}.")
    settings = {"layers": layers, "hidden_size": hidden_size, "step": _STEP}
    cells: dict[str, Any] = {}
    if out.is_file():
        before = json.loads(out.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            raise SystemExit(f"{out} was measured with other settings: {before['settings']}.")
        cells = before["cells"]
    for repeat in range(repeats):
        for number in widths:
            model, caches = _model(work, number, settings), work / f"caches-{number}-{repeat}"
            for start in STARTS:
                name = f"{number} widths/{start}/{repeat}"
                if name in cells:
                    continue
                cache = caches / ("eager" if start == "eager" else "compiled")
                if start == "warm" and not (cache / _FILLED).exists():  # what filled it belongs to an earlier run
                    _from_empty(model, cache, "cold")
                cells[name] = (_measured if start == "warm" else _from_empty)(model, cache, start)
                _write(out, settings, cells)
            shutil.rmtree(caches, ignore_errors=True)
    _write(out, settings, cells)
    for row in _rows(cells):
        typer.echo(json.dumps(row))


def _model(work: Path, number: int, settings: Mapping[str, int]) -> Path:
    """A model of so many distinct widths, each in as many layers as the others, or in one more."""
    layers, hidden = settings["layers"], settings["hidden_size"]
    directory, whole = work / f"{number}-widths", work / "whole"
    middle, most = 3 * hidden, 3 * hidden + _STEP * layers
    if not whole.exists():
        shape = {
            "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": most,
            "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "vocab_size": 49152,
            "max_position_embeddings": 512, "tie_word_embeddings": True,
        }  # fmt: skip
        partial = work / "whole.partial"
        shutil.rmtree(partial, ignore_errors=True)
        generate(partial, shape)
        partial.rename(whole)
    if not directory.exists():
        chosen = [middle + _STEP * (index % number - number // 2) for index in range(layers)]
        partial = work / f"{number}-widths.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        layout = [LayerLayout(attention=True, intermediate_size=width) for width in chosen]
        write_pruned(open_checkpoint(whole), layout, [np.arange(width, dtype=np.int64) for width in chosen], partial)
        partial.rename(directory)
    return directory


def _from_empty(model: Path, cache: Path, start: str) -> dict[str, Any]:
    shutil.rmtree(cache, ignore_errors=True)
    found = _measured(model, cache, start)
    (cache / _FILLED).touch()
    return found


def _measured(model: Path, cache: Path, start: str) -> dict[str, Any]:
    """One start in a fresh process."""
    cache.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_start, model, cache, start).result()


def _start(model: Path, cache: Path, start: str) -> dict[str, Any]:
    # In this very process, so that its processor time and torch's counters can be seen.
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1",
        VLLM_CACHE_ROOT=str(cache / "vllm"), TORCHINDUCTOR_CACHE_DIR=str(cache / "inductor"),
    )  # fmt: skip
    import torch
    import vllm  # noqa: F401 (its import takes long, and is the same for all)
    from vllm.compilation.counter import compilation_counter

    load, began_s, used_s = os.getloadavg()[0], time.monotonic(), _processor_s()
    options = {"enforce_eager": start == "eager", "skip_tokenizer_init": True}
    engine = VllmEngine(model, max_model_len=128, options=options)
    ready_s, ready_used_s = time.monotonic(), _processor_s()
    engine.generate(_PROMPT, _NUM_TOKENS)
    answered_s = time.monotonic()
    mode = engine._llm.llm_engine.vllm_config.compilation_config.mode
    engine.close()
    return {
        "start_s": ready_s - began_s,
        "start_processor_s": ready_used_s - used_s,
        "first_answer_s": answered_s - ready_s,
        "mode": mode.name,
        **{name: getattr(compilation_counter, name) for name in _COUNTS},
        # Wherever vLLM puts torch's cache, it is below this.
        "compiled_files": sum(1 for _ in cache.rglob("*.so")),
        "cache_bytes": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
        "load_before": load,
        "torch_threads": torch.get_num_threads(),
    }


def _processor_s() -> float:
    """Of this process and of the compilers that it has waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in both)


def _rows(cells: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each number of widths, medians over repeats of each kind of start."""
    found: dict[int, dict[str, list[Mapping[str, Any]]]] = {}
    for name, cell in cells.items():
        number, start, _ = name.split("/")
        found.setdefault(int(number.split()[0]), {}).setdefault(start, []).append(cell)
    keys = ("start_s", "start_processor_s", "compiled_files", *_COUNTS)
    return [
        {"widths": number}
        | {
            start: {"starts": len(each)} | {key: median(cell[key] for cell in each) for key in keys}
            for start, each in starts.items()
        }
        for number, starts in sorted(found.items())
    ]


def _write(out: Path, settings: Mapping[str, int], cells: Mapping[str, Any]) -> None:
    result = {
        "schema_version": 1,
        "kind": "compile_time",
        "metric": "seconds from an imported vLLM to an engine that can answer; processor seconds with compilers",
        "settings": settings,
        "rows": _rows(cells),
        "cells": cells,
        "environment": describe_environment(),
    }
    write_text(out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
