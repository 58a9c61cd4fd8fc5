"""A checkpoint, pruned or not, in vLLM without a server."""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from serving.engines.vllm_environment import check_plugins, check_socket_place
from toolchain.checkpoint.directory import dtype_name
from toolchain.checkpoint.quantized import open_servable
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.lifetime import ENGINE_VARIABLE

KV_CACHE_BYTES = 2**30
# For a few short prompts: starts fast, leaves memory to others, and computes every position afresh.
_OPTIONS: Mapping[str, Any] = {
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
    "max_num_seqs": 8,
    # What must be free on a GPU when it starts, whatever its cache is told to take: others may be using it.
    "gpu_memory_utilization": 0.01,
}
_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # Where the CPU can, vLLM would also round what goes into a matrix of 4-bit weights, which is not what w4a16 says.
    "VLLM_CPU_INT4_W4A8": "0",
    # vLLM looks at model classes in a fresh interpreter, where a directory `serving` in the working directory must not
    # be taken for ours.
    "PYTHONSAFEPATH": "1",
    # It would fork unless CUDA is in use here, and to have asked whether there is a GPU is enough to spoil a fork.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Triton multiplies float32 with ten bits of mantissa otherwise.
    "TRITON_F32_DEFAULT": "ieee",
    ENGINE_VARIABLE: "1",
}


class VllmEngine:
    """vLLM's offline engine. It starts processes, so a script that uses it needs ``if __name__ == "__main__":``."""

    name = "vllm"

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype | None = None,
        max_model_len: int = 512,
        max_logprobs: int = 20,
        options: Mapping[str, Any] | None = None,
        described_by: Path | None = None,
    ) -> None:
        """Starts vLLM and loads the checkpoint.

        Args:
            directory: A checkpoint, quantised or not.
            dtype: Computed in; by default what the weights are stored in (vLLM's own default would halve float32), and
                16 bits where they are quantised.
            max_model_len: Longest prompt and answer together, in tokens; lowered to what the model can.
            max_logprobs: The largest ``k`` of :meth:`top_log_probabilities`.
            options: Further ones of ``vllm.LLM``, such as ``tensor_parallel_size``; they override ours.
            described_by: The checkpoint to take dtype and context from, where ``directory`` is a form of it that only
                servers read.

        Raises:
            SenteiError: Not a good checkpoint, ``VLLM_PLUGINS`` leaves out sentei's plugin, or vLLM cannot load it; its
                own messages are on stderr.
            MissingDependencyError: vLLM is not installed.
        """
        if described_by is None:  # the other form is read by vLLM's own class
            check_plugins()
        check_socket_place()
        checkpoint = open_servable(described_by or directory)
        dtype = dtype or checkpoint.dtype
        limit = checkpoint.config.get("max_position_embeddings") or max_model_len
        arguments = {
            **_OPTIONS,
            "model": str(directory.resolve()),
            "dtype": dtype_name(dtype),
            "max_model_len": min(max_model_len, limit),
            "max_logprobs": max_logprobs,
            "trust_remote_code": False,
            **(options or {}),
        }
        try:
            with _environment(), _stdout_on_stderr():
                self._vllm = _import_vllm()
                self._llm = self._vllm.LLM(**arguments)
        except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
            # The engine runs in another process, and of what happened there vLLM tells this one almost nothing.
            raise SenteiError(
                f"{directory} cannot be loaded by vLLM ({_first_line(error)}).", "vLLM's own messages are on stderr."
            ) from error

    @property
    def num_kv_cache_tokens(self) -> int:
        """How many tokens the KV cache holds."""
        config = self._llm.llm_engine.vllm_config.cache_config
        return int(config.num_gpu_blocks) * int(config.block_size)

    def top_log_probabilities(self, prompts: Sequence[Sequence[int]], k: int) -> list[list[dict[int, float]]]:
        """See :class:`serving.engines.transformers.Engine`."""
        outputs = self._generate(prompts, max_tokens=1, prompt_logprobs=k)
        return [
            [
                {token: float(each.logprob) for token, each in position.items()}
                for position in output.prompt_logprobs[1:]
            ]
            for output in outputs
        ]

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """See :class:`serving.engines.transformers.Engine`."""
        return self.generate_batch([prompt], max_new_tokens)[0]

    def generate_batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens after each prompt; the prompts run together."""
        return [list(each.outputs[0].token_ids) for each in self._generate(prompts, max_tokens=max_new_tokens)]

    def close(self) -> None:
        """Ends vLLM's processes."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        params = self._vllm.SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **sampling)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        try:
            return self._llm.generate(inputs, params, use_tqdm=False)
        except EngineDeadError as error:
            # Some kernels load what they cannot run.
            raise SenteiError("vLLM stopped while it ran the model.", "Its own messages are on stderr.") from error


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise MissingDependencyError("vLLM", "vllm") from error


@contextmanager
def _environment() -> Iterator[None]:
    """Sets what vLLM's processes start with; servers started later in this process must not inherit it."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Sends what vLLM's processes print to stderr: stdout belongs to the command's result."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
