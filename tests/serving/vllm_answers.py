"""Asks vLLM about several checkpoints in one process: run as ``python -m tests.serving.vllm_answers JOBS.json``.

Starting vLLM takes half a minute; a further model in the same process takes seconds. A process of its own, since vLLM
changes threads and signal handlers of the one it runs in.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

NUM_NEW_TOKENS = 12
KV_CACHE_BYTES = 2**24


def main(jobs_file: Path) -> None:
    """Answers a list of jobs into ``JOBS.json.answers``.

    A job has ``directory``, ``prompts`` (lists of tokens), and maybe ``adapters`` (directories of LoRA adapters) and
    ``wrong_adapters`` (those that must not be loaded), ``dtype`` (what is computed in), ``options`` (further ones of
    ``vllm.LLM``), ``tensor_parallel_size``, or ``source`` (of a nemotron-nas export, the checkpoint it was made from).
    """
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    answers = [_answers(job) for job in json.loads(jobs_file.read_text())]
    Path(f"{jobs_file}.answers").write_text(json.dumps(answers))


def _answers(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from serving.engines.vllm import VllmEngine
    from serving.verify.decilm import start_vllm
    from toolchain.checkpoint.directory import open_checkpoint

    dtype = getattr(torch, job["dtype"]) if "dtype" in job else None
    options = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": KV_CACHE_BYTES, "enable_lora": "adapters" in job}
    options |= job.get("options", {})
    if ranks := job.get("tensor_parallel_size"):
        options["tensor_parallel_size"] = ranks
        # Ranks that share one memory node must be told which cores are whose.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(ranks))
    directory = Path(job["directory"])
    try:
        if "source" in job:
            engine = start_vllm(directory, open_checkpoint(Path(job["source"])), max_model_len=64, **options)
        else:
            engine = VllmEngine(directory, dtype=dtype, max_model_len=64, options=options)
    except Exception as error:  # what vLLM's engine process would print, and what a test may expect
        return {"refused": str(error)}
    prompts, adapters = job["prompts"], job.get("adapters", [])
    try:
        return {
            # With LoRA enabled, vLLM's CPU build (0.32) fails on log-probabilities of prompts. A draft is of answers.
            "log_probabilities": [
                [list(position.items()) for position in prompt] for prompt in engine.top_log_probabilities(prompts, 10)
            ]
            if "adapters" not in job and "speculative_config" not in options
            else None,
            "greedy": engine.generate_batch(prompts, NUM_NEW_TOKENS),
            "num_kv_cache_tokens": engine.num_kv_cache_tokens,
            "kv_cache": _kv_cache(engine),
            "num_accepted_drafts": _num_accepted_drafts(engine) if "speculative_config" in options else None,
            "adapted": [_adapted(engine, prompts, *each) for each in enumerate(adapters, 1)],
            "refused_adapters": [_refused(engine, *each) for each in enumerate(job.get("wrong_adapters", []), 100)],
        }
    finally:
        engine.close()


def _adapted(engine: Any, prompts: list[list[int]], number: int, adapter: str) -> list[list[int]]:
    """Greedy tokens with a LoRA adapter."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    request = LoRARequest(f"adapter-{number}", number, adapter)
    outputs = engine._llm.generate(inputs, sampling, use_tqdm=False, lora_request=request)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _refused(engine: Any, number: int, adapter: str) -> str | None:
    """What a server answers to a client that loads an adapter; nothing where it was loaded."""
    from vllm.lora.request import LoRARequest

    try:
        engine._llm.llm_engine.add_lora(LoRARequest(Path(adapter).name, number, adapter))
    except Exception as error:
        return str(error)
    return None


def _kv_cache(engine: Any) -> dict[str, Any]:
    """The pool of blocks, and the layers of each group that shares it."""
    config = engine._llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    return {
        "num_blocks": config.num_blocks,
        "groups": [
            {"kind": type(group.kv_cache_spec).__name__, "layers": group.layer_names}
            for group in config.kv_cache_groups
        ],
    }


def _num_accepted_drafts(engine: Any) -> int:
    """Tokens that the drafter proposed and the model took."""
    metrics = engine._llm.get_metrics()
    return sum(int(each.value) for each in metrics if each.name == "vllm:spec_decode_num_accepted_tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
