"""Which of vLLM's options a benchmark takes: those that leave expectation and roofline true, and two that these follow.

The list is closed. An option that changes the weights' precision, how the model is divided, what the KV cache holds or
how many tokens a step gives would leave every expectation about another server than the one that was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from serving.forecast.model_facts import ModelFacts
from serving.server.vllm.options import refused_remote_code
from toolchain.errors import SenteiError
from toolchain.given_options import given_options

TENSOR_PARALLEL, KV_DTYPE = "--tensor-parallel-size", "--kv-cache-dtype"
# Bytes of one number in the KV cache; "auto" is the model's own dtype.
_KV_BYTES = {"auto": None, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
MODELLED = (TENSOR_PARALLEL, KV_DTYPE)
# By themselves these move speed, for both models alike, and nothing that the expectation is computed from.
_NEUTRAL = (
    "--async-scheduling", "--attention-backend", "--block-size", "--compilation-config", "--cudagraph-capture-sizes",
    "--disable-hybrid-kv-cache-manager", "--disable-log-stats", "--enable-chunked-prefill", "--enable-log-requests",
    "--enable-prefix-caching", "--enforce-eager", "--generation-config", "--gpu-memory-utilization",
    "--kv-cache-memory-bytes", "--linear-backend", "--long-prefill-token-threshold", "--max-cudagraph-capture-size",
    "--max-logprobs", "--max-model-len", "--max-num-batched-tokens", "--max-num-seqs", "--num-gpu-blocks-override",
    "--optimization-level", "--performance-mode", "--safetensors-load-strategy", "--scheduling-policy", "--seed",
    "--served-model-name", "--stream-interval", "--tokenizer", "--tokenizer-mode",
)  # fmt: skip
_WHY_NOT = {
    "--quantization": "It rounds the weights while they are loaded. Use sentei quantize, whose bytes are known.",
    "--speculative-config": "The expectation is about one token per step.",
    "--pipeline-parallel-size": "The expectation knows no stages. Use --tensor-parallel-size.",
    "--data-parallel-size": "Measure one of the servers.",
    "--cpu-offload-gb": "Weights read over the bus are not what the expectation is about.",
    "--hf-overrides": "It would measure another model than the one in the directory.",
    "--config": "A file would hide its options from the results. Give them one by one.",
}


@dataclass(frozen=True, kw_only=True)
class EngineShape:
    """What options change of what is expected.

    Attributes:
        num_gpus: The model is divided over as many (tensor parallelism): together they read and compute as many times
            as fast. What they tell each other is not counted.
        kv_itemsize: Bytes of a number in the KV cache; ``None`` is the computing dtype's.
    """

    num_gpus: int = 1
    kv_itemsize: int | None = None

    def applied(self, facts: ModelFacts, itemsize: int) -> ModelFacts:
        """A model's facts with this KV cache; ``itemsize`` is what the facts were computed with."""
        if self.kv_itemsize is None:
            return facts
        return replace(facts, kv_bytes_per_token=facts.kv_bytes_per_token * self.kv_itemsize // itemsize)


def read_vllm_options(options: Sequence[str]) -> EngineShape:
    """Checks vLLM's options against the closed list, and reads those that change what is expected.

    Args:
        options: As on a command line: ``--name=value``, or a name and its value after it.

    Raises:
        SenteiError: An option that is not on the list, or a value that is not modelled.
    """
    given = given_options(options)
    for name in given:
        if name == "--trust-remote-code":
            raise refused_remote_code(name)
        plain = f"--{name[5:]}" if name.startswith("--no-") else name
        if plain not in (*_NEUTRAL, *MODELLED):
            raise SenteiError(
                f"The engine option {name} is not one whose effect the expectation knows.",
                _WHY_NOT.get(name, f"Possible are {', '.join((*MODELLED, *_NEUTRAL))}, by their whole names."),
            )
    return EngineShape(num_gpus=_num_gpus(given), kv_itemsize=_kv_itemsize(given))


def _num_gpus(given: dict[str, str]) -> int:
    text = given.get(TENSOR_PARALLEL, "1")
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise SenteiError(f"{TENSOR_PARALLEL} {text!r} is not a number of GPUs.", f"Write it like {TENSOR_PARALLEL}=2.")
    return int(text)


def _kv_itemsize(given: dict[str, str]) -> int | None:
    text = given.get(KV_DTYPE, "auto")
    if text not in _KV_BYTES:
        raise SenteiError(
            f"{KV_DTYPE} {text!r} is not one whose bytes the expectation knows.",
            f"Possible are {', '.join(_KV_BYTES)}.",
        )
    return _KV_BYTES[text]
