"""``sentei demo``: the whole main job on a model and a text that need no network."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolchain.cli.console import Output
from toolchain.cli.options import ForceOption, JsonOption, OutOption, QuietOption
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.outputs import new_directory, writes_directory

_SPARSITY = 0.25
# Both stages are to be seen: 2SSP's published formula removes two, the default with ranked widths none.
_ATTENTION_REMOVALS = 2
_SEQ_LEN, _CALIBRATION_WINDOWS, _EVALUATION_WINDOWS, _GENERATIONS = 512, 32, 32, 4
# Even: each model is started first as often as the other.
_REPEATS = 4
_LENGTHS = {"input_len": 128, "output_len": 32}
# A short context, and no compilation: the servers start in half a minute.
_VLLM_OPTIONS = ("--max-model-len", "512", "--enforce-eager")


@writes_directory
def demo(
    *,
    out: OutOption = Path("demo"),
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole job on SmolLM2-135M: prune 25 %, export, verify, benchmark, report."""
    output = Output(as_json=as_json, quiet=quiet)
    has_vllm = importlib.util.find_spec("vllm") is not None
    output.note(_announcement(out, has_vllm=has_vllm))
    started = time.monotonic()
    with new_directory(out, force=force) as partial:
        summary = _prune(partial, output)
        steps = _steps(partial / "pruned", summary)
        evaluations = _evaluate(partial, output)
        verdicts = _export(partial, output)
        benchmarks = _benchmark(partial, output, has_vllm=has_vllm)
        from serving.report.render import render_report

        parts = ["pruned", "evaluation", "onnx", "vllm", *(f"benchmark-{name}" for name in benchmarks)]
        render_report([partial / part for part in parts if (partial / part).exists()], partial / "report.html")
    result = {
        "report": str(out / "report.html"),
        "original": str(out / "original"),
        "pruned": str(out / "pruned"),
        "sparsity": summary["sparsity"],
        "steps": steps,
        "perplexity": evaluations,
        "verified": verdicts,
        "output_throughput_gain": benchmarks,
        "duration_s": round(time.monotonic() - started, 1),
    }
    output.result(result, lambda console: console.print(_closing(out, result)))


def _announcement(out: Path, *, has_vllm: bool) -> str:
    engines = "ONNX Runtime and vLLM" if has_vllm else "ONNX Runtime (vLLM is not installed)"
    return (
        f"Demo: SmolLM2-135M-Instruct, pruned by {_SPARSITY:.0%}, in {out}/\n"
        "  1. import the model, and the prose of Python's language reference: half to calibrate, half to evaluate\n"
        f"  2. prune: the FFN neurons that matter least, then {_ATTENTION_REMOVALS} attentions, one by one; "
        "re-fit what is left\n"
        "  3. perplexity of original and pruned, and what they write\n"
        "  4. export both, and verify the exports against their checkpoints\n"
        f"  5. benchmark original against pruned: {engines}\n"
        "  6. report.html\n"
        f"About {'12' if has_vllm else '7'} minutes on 2 CPU cores."
    )


def _closing(out: Path, result: dict[str, Any]) -> str:
    perplexity = result["perplexity"]
    lines = [
        f"Done in {result['duration_s'] / 60:.1f} minutes.",
        f"  {result['sparsity']:.1%} of the decoder-block parameters removed; on the calibration text:",
        *_step_lines(result["steps"]),
        f"    {_ATTENTION_REMOVALS} attentions, as 2SSP's formula has it; sentei prune's default removes none here",
        f"  perplexity {perplexity['original']:.1f} → {perplexity['pruned']:.1f} on text not calibrated with",
        *(
            f"  {engine}: {gain['value']:.2f}x output throughput (95 %: {gain['low']:.2f} to {gain['high']:.2f})"
            for engine, gain in result["output_throughput_gain"].items()
        ),
        "",
        f"  {out}/report.html        the report: open it in a browser",
        f"  {out}/original, pruned   the models",
        f"  {out}/pruned/plan.json   what was removed: look with sentei plan show {out}/pruned",
        f"  {out}/vllm               for vLLM: sentei serve {out}/vllm",
        f"  {out}/onnx               for ONNX Runtime: sentei generate {out}/onnx --prompt 'Hello'",
    ]
    return "\n".join(lines)


def _steps(pruned: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What was taken away in turn, and what that bought and cost."""
    from toolchain.plan.plan import load_plan

    plan = load_plan(pruned)
    original, *narrowed = plan.steps[: len(plan.document.stage_1) + 1]
    ends = [original, narrowed[-1], *plan.steps[len(narrowed) + 1 :]]
    num_layers = len(plan.layout)
    steps = [
        {
            "label": step.label,
            "sparsity": 1 - step.num_block_parameters / original.num_block_parameters,
            "kv_cache": 1 - max(number - 1, 0) / num_layers,
            "perplexity": step.metric,
        }
        for number, step in enumerate(ends)
    ]
    refitted = {"label": f"{summary['num_refitted']} projections re-fitted"}
    return [*steps, {**steps[-1], **refitted, "perplexity": summary["calibration_metric"]["pruned"]}]


def _step_lines(steps: list[dict[str, Any]]) -> list[str]:
    widest = max(len(step["label"]) for step in steps)
    return [
        f"    {step['label']:<{widest}} {step['sparsity']:>6.1%}   KV cache {step['kv_cache']:>4.0%}   "
        f"perplexity {step['perplexity']:.1f}"
        for step in steps
    ]


def _prune(directory: Path, output: Output) -> dict[str, Any]:
    import torch

    from toolchain.model.gguf import demo_gguf, import_gguf
    from toolchain.prune.methods import DEFAULT
    from toolchain.prune.pipeline import prune
    from toolchain.prune.settings import PruneSettings
    from toolchain.text.embedded import write_halves
    from toolchain.text.sources import TextSource

    output.note("Importing the model ...")
    import_gguf(demo_gguf(), directory / "original")
    (directory / "text").mkdir()
    write_halves(directory / "text")
    settings = PruneSettings(
        sparsity=_SPARSITY,
        calibration=[TextSource(directory / "text" / "calibration.txt")],
        num_samples=_CALIBRATION_WINDOWS,
        seq_len=_SEQ_LEN,
        align=64,
        attention_removals=_ATTENTION_REMOVALS,
        device="cpu",
        dtype=torch.float32,
        seed=0,
        **DEFAULT.settings,
    )
    return prune(
        directory / "original",
        directory / "pruned",
        settings,
        model_name="SmolLM2-135M-Instruct",
        progress=output.progress,
    )


def _evaluate(directory: Path, output: Output) -> dict[str, float]:
    import torch

    from toolchain.evaluate.run import EvaluationSettings, evaluate
    from toolchain.parts_cache import Parts

    settings = EvaluationSettings(
        texts=(directory / "text" / "evaluation.txt",),
        num_windows=_EVALUATION_WINDOWS,
        seq_len=_SEQ_LEN,
        num_generations=_GENERATIONS,
        device="cpu",
        dtype=torch.float32,
    )
    document = evaluate(directory / "pruned", directory / "original", settings, Parts(None), progress=output.progress)
    (directory / "evaluation").mkdir()
    document.save(directory / "evaluation")
    return {each.model: each.perplexity for each in document.evaluations}


def _export(directory: Path, output: Output) -> dict[str, bool]:
    from export.onnx_graph import export_onnx
    from export.vllm import export_vllm
    from serving.verify.verify import EngineName, verify

    exports: tuple[tuple[str, str, Callable[[Path, Path], object], EngineName], ...] = (
        ("onnx-original", "original", export_onnx, "onnx"),
        ("onnx", "pruned", export_onnx, "onnx"),
        ("vllm", "pruned", export_vllm, "transformers"),
    )
    verdicts = {}
    with output.progress("Export and verify", len(exports)) as advance:
        for name, source, export, engine in exports:
            export(directory / source, directory / name)
            verdict = verify(directory / name, directory / source, engine=engine)
            verdicts[name] = bool(verdict["passed"])
            advance()
    if failed := [name for name, passed in verdicts.items() if not passed]:
        raise CheckFailedError(f"The export {failed[0]} differs from its checkpoint.", "Please report this.")
    return verdicts


def _benchmark(directory: Path, output: Output, *, has_vllm: bool) -> dict[str, dict[str, float]]:
    from serving.benchmark.run import benchmark
    from serving.benchmark.settings import BenchmarkSettings
    from serving.benchmark.workload import make_workloads

    # Engine, original, pruned, options.
    pairs: list[tuple[str, str, str, tuple[str, ...]]] = [("onnx", "onnx-original", "onnx", ())]
    if has_vllm:
        pairs.append(("vllm", "original", "vllm", _VLLM_OPTIONS))
    gains = {}
    for engine, original, pruned, options in pairs:
        results = benchmark(
            directory / original,
            directory / pruned,
            BenchmarkSettings(
                engine=engine,
                workloads=make_workloads(engine=engine, **_LENGTHS),  # type: ignore[arg-type]
                repeats=_REPEATS,
                engine_options=options,
            ),
            out=directory / f"benchmark-{engine}",
            on_progress=output.note,
        )
        gain = results["measurements"][0]["metrics"]["output_throughput"]["gain"]
        if gain is None:
            raise SenteiError(f"The benchmark with {engine} measured no throughput.")
        gains[engine] = gain
    return gains
