"""Measures one model in a process of its own, so that its memory is its own.

``python -m serving.benchmark.sessions.worker`` speaks JSON lines: one command on stdin, one answer on
stdout. ``load`` first, then ``measure`` as often as wanted. An empty line before the answer says that tokens still
come. Everything that libraries print goes to stderr. Ends when stdin closes, and with its parent.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.benchmark.process_memory import peak_resident_bytes, resident_bytes
from serving.engines.spec import ENGINES
from serving.onnx_export.files import check_files, check_graph, read_settings
from toolchain.checkpoint.directory import dtype_name
from toolchain.devices import parse_device
from toolchain.errors import SenteiError
from toolchain.lifetime import end_with_parent
from toolchain.onnx_libraries import import_onnx_library

# Prompts int64 [batch, input_len] and a number of tokens in; yields as soon as the host has a token of each prompt.
Decode = Callable[[NDArray[np.int64], int], Iterator[None]]
_SIGN_OF_LIFE_S = 1.0  # more often would disturb what is measured


def load_transformers(directory: Path, device: str, dtype: str | None) -> tuple[Decode, dict[str, Any]]:
    """A greedy token-by-token decoder in Transformers, and what to say of it."""
    import torch
    from transformers import DynamicCache

    from toolchain.model.loading import CACHE_ARGUMENT, load_model

    baseline = resident_bytes()
    device = resolve_device(device, cuda_available=torch.cuda.is_available())
    model = load_model(directory, dtype=getattr(torch, dtype) if dtype else None, device=device)

    @torch.inference_mode()
    def decode(prompts: NDArray[np.int64], num_tokens: int) -> Iterator[None]:
        ids, cache = torch.from_numpy(prompts).to(device), DynamicCache()
        for _ in range(num_tokens):
            out = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            ids.tolist()  # waits for the device: a token counts when the host has it
            yield

    return decode, {
        "device": device,
        "dtype": dtype_name(model.dtype),
        "threads": torch.get_num_threads(),
        "baseline_memory_bytes": baseline,
    }


def load_onnx(directory: Path, device: str, dtype: str | None) -> tuple[Decode, dict[str, Any]]:
    """A greedy token-by-token decoder in onnxruntime-genai, and what to say of it."""
    og = import_onnx_library("onnxruntime_genai")
    if dtype:
        raise SenteiError("An ONNX export has its precision built in.", "Leave --dtype out, or export again.")
    check_graph(directory)
    settings = read_settings(directory)
    baseline = resident_bytes()
    wanted = settings.device if device == "auto" else device
    device = resolve_device(wanted, cuda_available=og.is_cuda_available())
    config = og.Config(str(directory))
    config.clear_providers()
    provider, _, index = device.partition(":")
    if provider != "cpu":
        config.append_provider(provider)
    if index:
        config.set_provider_option(provider, "device_id", index)
    model = og.Model(config)

    def decode(prompts: NDArray[np.int64], num_tokens: int) -> Iterator[None]:
        batch_size, input_len = prompts.shape
        params = og.GeneratorParams(model)
        # min_length masks the end-of-sequence token: every request gets exactly num_tokens.
        length = input_len + num_tokens
        params.set_search_options(
            do_sample=False, batch_size=batch_size, min_length=length, max_length=settings.cache_length(length)
        )
        generator = og.Generator(model, params)
        generator.append_tokens(prompts.astype(np.int32))
        for _ in range(num_tokens):
            generator.generate_next_token()
            generator.get_next_tokens()
            yield

    # How many threads ONNX Runtime takes is its own affair unless genai_config.json says so.
    return decode, {"device": device, "dtype": None, "threads": None, "baseline_memory_bytes": baseline}


def resolve_device(device: str, *, cuda_available: bool) -> str:
    """The device's one name; ``auto`` becomes ``cuda`` where the engine can use it, else ``cpu``.

    Raises:
        SenteiError: No device, or CUDA is asked for and the engine cannot use it.
    """
    device = parse_device(device)
    if device == "auto":
        return "cuda" if cuda_available else "cpu"
    if device.startswith("cuda") and not cuda_available:
        raise SenteiError("This engine, as installed here, finds no CUDA device.", "Use --device cpu.")
    return device


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids, the same for the same seed: speed does not depend on what they mean."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def measure(
    decode: Decode,
    prompts: list[list[int]],
    output_len: int,
    batch_size: int,
    on_token: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Answers prompts of one length in batches, one batch after another.

    Returns:
        One ``{"start_s", "token_times_s"}`` a request; the requests of a batch share their times.
    """
    requests: list[dict[str, Any]] = []
    for first in range(0, len(prompts), batch_size):
        batch = np.asarray(prompts[first : first + batch_size], dtype=np.int64)
        start_s, times_s = time.perf_counter(), []
        for _ in decode(batch, output_len):
            times_s.append(time.perf_counter())
            on_token()
        requests += [{"start_s": start_s, "token_times_s": times_s}] * len(batch)
    return requests


def peak_memory_bytes(device: str) -> int | None:
    """This process's peak: resident memory on a CPU, memory allocated by torch on a GPU; ``None`` if unknown."""
    if device == "cpu":
        return peak_resident_bytes()
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated(device))


class _Session:
    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token
        self._decode: Decode | None = None
        self._device = "cpu"

    def load(self, *, engine: str, directory: str, device: str, dtype: str | None) -> dict[str, Any]:
        loader = {"transformers": load_transformers, "onnx": load_onnx}[engine]
        if ENGINES[engine].reads_onnx:
            check_files(Path(directory))  # not part of what is measured
        start_s = time.perf_counter()
        self._decode, facts = loader(Path(directory), device, dtype)
        self._device = facts["device"]
        return {**facts, "startup_s": time.perf_counter() - start_s}

    def measure(
        self, *, num_prompts: int, input_len: int, vocab_size: int, seed: int, output_len: int, batch_size: int
    ) -> dict[str, Any]:
        assert self._decode is not None, "load comes before measure"
        prompts = random_prompts(num_prompts, input_len, vocab_size, seed)
        requests = measure(self._decode, prompts, output_len, batch_size, self._on_token)
        return {"requests": requests, "peak_memory_bytes": peak_memory_bytes(self._device)}


def main() -> None:
    """Reads commands until stdin closes."""
    end_with_parent(reads_stdin=True)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    told_s = time.monotonic()

    def tell_of_life() -> None:
        nonlocal told_s
        if (now_s := time.monotonic()) - told_s >= _SIGN_OF_LIFE_S:
            told_s = now_s
            answers.write("\n")
            answers.flush()

    session = _Session(tell_of_life)
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("command")
        try:
            answer = session.load(**request) if name == "load" else session.measure(**request)
        except SenteiError as error:
            answer = {"error": error.message, "hint": error.hint}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
