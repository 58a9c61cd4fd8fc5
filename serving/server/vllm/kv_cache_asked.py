"""How large a KV cache vLLM's options ask for, as far as they say so in plain words.

What stands in a file (``--config``) or is abbreviated is vLLM's to read and to check, after it has loaded the weights.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.given_options import given_options

_CPU_SPACE_GIB = "VLLM_CPU_KVCACHE_SPACE"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)")
_POWERS = "kmgt"
# With these, what stands where is vLLM's to compute.
_OTHER_WAYS = {
    "--config", "--cpu-offload-gb", "--gpu-memory-utilization", "--load-format", "--pipeline-parallel-size", "-pp",
}  # fmt: skip
_DTYPES = {"half": "float16", "float": "float32", "float16": "float16", "float32": "float32", "bfloat16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class KvCacheAsked:
    """What the options say; ``None`` where they say nothing, or nothing that is understood.

    Attributes:
        max_model_len: Tokens of the longest request.
        bytes_per_rank: Of the whole cache, on each GPU.
        tensor_parallel_size: GPUs that share the model.
        dtype: What is computed in.
        stored_otherwise: Whether the cache has a dtype of its own.
        spread_otherwise: Whether weights or cache are where, or of a size, that is not computed here.
    """

    max_model_len: int | None = None
    bytes_per_rank: int | None = None
    tensor_parallel_size: int | None = None
    dtype: str | None = None
    stored_otherwise: bool = False
    spread_otherwise: bool = False


def kv_cache_asked(options: Sequence[str], *, on_cpu: bool) -> KvCacheAsked:
    """Reads vLLM's options and, for its CPU build, the variable that says the same.

    Args:
        options: Of ``vllm serve``.
        on_cpu: Whether vLLM runs on a CPU.
    """
    given = given_options(options)
    asked_bytes = _number(given.get("--kv-cache-memory-bytes"))
    space = os.environ.get(_CPU_SPACE_GIB, "")
    if asked_bytes is None and on_cpu and space.isdecimal() and int(space):
        asked_bytes = int(space) * 2**30
    return KvCacheAsked(
        max_model_len=_number(given.get("--max-model-len")),
        bytes_per_rank=asked_bytes,
        tensor_parallel_size=_number(given.get("--tensor-parallel-size", given.get("-tp"))),
        dtype=_DTYPES.get(given.get("--dtype", "")),
        stored_otherwise=given.get("--kv-cache-dtype", "auto") != "auto",
        spread_otherwise=not _OTHER_WAYS.isdisjoint(given),
    )


def _number(text: str | None) -> int | None:
    """A whole number above 0 in vLLM's spelling: ``4k`` is 4000, ``4K`` is 4096."""
    parts = _SIZE.fullmatch(text or "")
    if parts is None:
        return None
    unit = parts[2]
    power = _POWERS.index(unit.lower()) + 1 if unit else 0
    return int(float(parts[1]) * (1024 if unit.isupper() else 1000) ** power) or None
