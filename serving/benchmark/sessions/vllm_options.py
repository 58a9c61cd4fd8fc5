"""What a benchmark adds to the user's engine options: room for the load, and what makes a comparison fair."""

import os
from collections.abc import Collection, Mapping, Sequence

import torch

from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import Side
from serving.server.vllm.kv_cache_asked import kv_cache_asked
from toolchain.given_options import given_options
from toolchain.memory import available_bytes

CONTEXT = "--max-model-len"
_KV_BYTES, _NO_PREFIXES = "--kv-cache-memory-bytes", "--no-enable-prefix-caching"
_CPU_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_LEAST_KV_BYTES = 2**30
# Tokens that a server may add to a prompt.
_MARGIN = 16
# Which other option of the user's says the same.
_INSTEAD: Mapping[str, Sequence[str]] = {
    _NO_PREFIXES: ("--enable-prefix-caching",),
    _KV_BYTES: ("--gpu-memory-utilization",),  # of the machine's memory, where vLLM runs on a CPU
}


def vllm_device() -> str:
    """What the vLLM that is installed runs on: its build goes with torch's."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def context_of(sides: Collection[Side], settings: BenchmarkSettings) -> int:
    """Tokens that each server has to take at once: no more than the longest request has, or than a model takes.

    Nor, unless the load itself is longer, more than Phi-3's short rotary factors reach: beyond, vLLM takes the long
    ones for every prompt, and the ONNX server does not start.
    """
    longest = max(workload.longest for workload in settings.workloads)
    served = min(side.facts.served_len for side in sides)
    return min(longest + _MARGIN, served if longest <= served else min(side.facts.max_len for side in sides))


def room_of(sides: Collection[Side], settings: BenchmarkSettings) -> dict[str, int]:
    """What vLLM is given by option, the same for all models.

    vLLM does not start unless its KV cache holds one request as long as the context, and a model's whole context may
    take gigabytes. On a CPU the cache gets 1 GiB, or what the requests in flight need together; left alone, vLLM would
    take much of the machine's memory.
    """
    context = context_of(sides, settings)
    room = {CONTEXT: context}
    if vllm_device() == "cpu" and _CPU_KV_SPACE not in os.environ:
        asked = kv_cache_asked(settings.engine_options, on_cpu=False).max_model_len
        one = max(side.facts.kv_bytes_to_start(asked or context) for side in sides)
        together = one * max(workload.concurrency or 1 for workload in settings.workloads)
        # vLLM refuses to take more than is free, and the weights need some of that.
        free = available_bytes(torch.device("cpu"))
        room[_KV_BYTES] = max(_LEAST_KV_BYTES, one, min(together, free // 2))
    return room


def engine_options_for(side: Side, settings: BenchmarkSettings, room: Mapping[str, int]) -> list[str]:
    """The options of vLLM for one model: one precision and no prefix cache, unless the user says otherwise.

    Args:
        side: The model.
        settings: With the user's options.
        room: See :func:`room_of`.
    """
    computed_in = settings.dtype or side.stored_dtype
    assert computed_in is not None, "vLLM runs checkpoints"
    # vLLM's "auto" would run a float32 checkpoint in half precision.
    return with_added(settings.engine_options, {"--dtype": computed_in, _NO_PREFIXES: None, **room})


def with_added(options: Sequence[str], fair: Mapping[str, object]) -> list[str]:
    """The user's options, and those of ``fair`` that they leave open; one without a value is a switch."""
    given = given_options(options).keys()
    added = {name: value for name, value in fair.items() if given.isdisjoint([name, *_INSTEAD.get(name, ())])}
    return [*options, *(str(each) for pair in added.items() for each in pair if each is not None)]
