"""Asks llama.cpp about GGUF files: run as ``python -m tests.serving.llama_cpp_answers JOBS.json``.

A process of its own: llama.cpp ends the one it runs in when something does not fit.
"""

import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp

# A token whose bytes are a string by themselves: of other answers the server tells no log-probabilities.
_WRITTEN_TOKEN = 300


def main(jobs_file: Path) -> None:
    """Answers a list of jobs into ``JOBS.json.answers``; a job has ``file`` and ``prompts`` (lists of tokens).

    An answer holds, for each prompt and each position but the last, the ten likeliest next tokens with their
    log-probabilities. Everything is computed in float32.
    """
    answers = [_answers(job["file"], job["prompts"]) for job in json.loads(jobs_file.read_text())]
    Path(f"{jobs_file}.answers").write_text(json.dumps(answers))


def _answers(file: str, prompts: list[list[int]]) -> list[list[list[tuple[int, float]]]]:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    return [[_next_tokens(server, prompt[:end]) for end in range(1, len(prompt))] for prompt in prompts]


def _next_tokens(server: Any, prompt: list[int]) -> list[tuple[int, float]]:
    """The logarithms are of the model's own probabilities: the bias only decides which token is written."""
    question = {
        "prompt": prompt, "n_predict": 1, "n_probs": 10, "temperature": 0.0, "cache_prompt": False,
        "logit_bias": [[_WRITTEN_TOKEN, 1000.0]],
    }  # fmt: skip
    written = server.handle_completions(question)["choices"][0]["logprobs"]["content"][0]
    return [(token["id"], token["logprob"]) for token in written["top_logprobs"]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
