"""An ONNX export in plain ONNX Runtime: the loop that a program without onnxruntime-genai needs.

A cache is a pair of buffers per attending layer, ``[batch, num_key_value_heads, capacity, head_size]``, allocated once
and bound both as ``past_key_values.*`` and as ``present.*``: ``GroupQueryAttention`` then writes new keys and values in
place. Rows may differ in length: they are padded on the right, and ``attention_mask`` has as many ones in a row as
the row has tokens, from which the graph makes ``seqlens_k``. So each row's next token goes right behind its last one,
over the padding, and its logits are those at its own last position.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serving.engines.kv_pages import KvPages
from serving.engines.transformers import top_of
from serving.onnx_export.files import check_files, damaged, first_line, original_context, read_settings
from toolchain.errors import SenteiError
from toolchain.onnx_libraries import import_onnx_library

_CACHE_INPUT = re.compile(r"past_key_values\.\d+\.(key|value)")
_PRESENT = ("past_key_values", "present")  # what the outputs are called
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_BATCH, _DECODED = 4, 8  # of comparisons: prompts at once, and tokens of each that are given one by one
# onnx.TensorProto's numbers, and bytes.
_ELEMENT_TYPES = {"tensor(float)": (1, 4), "tensor(float16)": (10, 2), "tensor(bfloat16)": (16, 2)}


@dataclass
class Cache:
    """Keys and values of a batch of sequences.

    Attributes:
        buffers: By input name, see above.
        lengths: int64 ``[batch]``, tokens of each row that are in it.
        capacity: Tokens a row can have.
        first_row: Of the buffers; they may have more rows than this cache.
        pages: The memory of the buffers, where rows can give theirs back.
    """

    buffers: dict[str, Any]
    lengths: NDArray[np.int64]
    capacity: int
    first_row: int = 0
    pages: list[KvPages] = field(default_factory=list)

    def rows(self, start: int, end: int) -> "Cache":
        """Some of the rows; what happens to them there happens here too."""
        return Cache(self.buffers, self.lengths[start:end], self.capacity, self.first_row + start, self.pages)

    def forget(self, row: int) -> None:
        """Empties a row, and gives its memory back where that can be done."""
        self.lengths[row] = 0
        for each in self.pages:
            each.give_back(self.first_row + row)


class OnnxEngine:
    """An ONNX export in an ``onnxruntime.InferenceSession`` on the device it was made for."""

    name = "onnx"

    def __init__(self, directory: Path, device: str | None = None) -> None:
        """Checks the files' hashes and opens the export.

        Args:
            directory: The export.
            device: cpu or cuda; by default what the export was made for. The CPU runs some of what was made for CUDA.

        Raises:
            SenteiError: Files are missing, damaged or not to be trusted, or ONNX Runtime has not the export's device.
            MissingDependencyError: onnxruntime is not installed.
        """
        self.settings = read_settings(directory)
        check_files(directory)
        self._directory = directory
        self._device = device or self.settings.device
        self._session = _open_session(directory / self.settings.filename, self._device)
        # Which layers have a cache is the graph's to say: layers without attention leave gaps in the numbering.
        self._caches = {each.name: each.type for each in self._session.get_inputs() if _CACHE_INPUT.match(each.name)}
        for name, kind in self._caches.items():
            if kind not in _ELEMENT_TYPES:
                raise SenteiError(f"{directory}: {name} is a {kind}; sentei runs caches of floats only.")

    @property
    def attending_layers(self) -> list[int]:
        """The layers that have a KV cache, ascending."""
        return sorted({int(name.split(".")[1]) for name in self._caches})

    @property
    def batch_context_length(self) -> int:
        """Tokens a row may have for its answer not to depend on the other rows.

        Phi-3's long rotary factors are for the whole batch, from the row on that exceeds the original context.
        """
        original = original_context(self._directory, self._session.get_modelmeta().custom_metadata_map)
        return min(self.settings.context_length, original or self.settings.context_length)

    @property
    def device(self) -> str:
        """Where it runs: cpu or cuda."""
        return self._device

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in the cache."""
        values = self.settings.num_key_value_heads * self.settings.head_size
        return values * sum(_ELEMENT_TYPES[kind][1] for kind in self._caches.values())

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """Allocates an empty cache; in float32 on a CPU, the system gives memory only as tokens come.

        Args:
            batch_size: Rows.
            capacity: Tokens a row can have, prompt and answer.

        Raises:
            SenteiError: The model's context is shorter.
            MemoryError: There is no memory for it; of CUDA, a ``RuntimeError``.
        """
        settings = self.settings
        if capacity > settings.context_length:
            raise SenteiError(f"{capacity} tokens are asked for; the model's context holds {settings.context_length}.")
        # Attention over a window wants a buffer that holds one window at least.
        shape = (batch_size, settings.num_key_value_heads, max(capacity, settings.window), settings.head_size)
        ort = import_onnx_library("onnxruntime")
        buffers, pages = {}, []
        for name, kind in self._caches.items():
            if kind == "tensor(float)" and self._device == "cpu":
                pages.append(KvPages(shape))
                buffers[name] = ort.OrtValue.ortvalue_from_numpy(pages[-1].array, "cpu")
            else:
                buffers[name] = ort.OrtValue.ortvalue_from_shape_and_type(
                    shape, _ELEMENT_TYPES[kind][0], self._device, 0
                )
        return Cache(buffers, np.zeros(batch_size, np.int64), capacity, pages=pages)

    def step(self, cache: Cache, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Runs the next tokens of every row of a batch.

        Args:
            cache: Is extended.
            rows: At least one token each. Their lengths may differ when the cache is empty; later, give a batch one
                token a row, and a single row any number.

        Returns:
            Logits after each token of each row: float32 ``[len(row), vocab_size]``.

        Raises:
            SenteiError: More tokens than the cache holds, or ONNX Runtime refuses.
        """
        if self.settings.window and len({len(row) for row in rows}) > 1:
            # Attention with a cache of one window takes no padding, so each row goes alone.
            return [self.step(cache.rows(index, index + 1), [row])[0] for index, row in enumerate(rows)]
        lengths = np.asarray([len(row) for row in rows], np.int64)
        total = cache.lengths + lengths
        if total.max() > cache.capacity:
            raise SenteiError(f"{total.max()} tokens do not fit into a cache of {cache.capacity}.")
        ids = np.zeros((len(rows), lengths.max()), np.int64)
        for filled, row in zip(ids, rows, strict=True):
            filled[: len(row)] = row
        mask = (np.arange(total.max()) < total[:, None]).astype(np.int64)
        try:
            binding = self._session.io_binding()
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_cpu_input("attention_mask", mask)
            binding.bind_output("logits", "cpu")
            for name, buffer in cache.buffers.items():
                element_type, size = _ELEMENT_TYPES[self._caches[name]]
                shape = [len(rows), *buffer.shape()[1:]]
                place = buffer.data_ptr() + cache.first_row * math.prod(shape[1:]) * size
                for bind, bound in ((binding.bind_input, name), (binding.bind_output, name.replace(*_PRESENT))):
                    bind(bound, self._device, 0, element_type, shape, place)
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise SenteiError(f"{self._directory} failed in ONNX Runtime ({first_line(error)}).") from error
        cache.lengths[:] = total
        logits = binding.get_outputs()[0].numpy().astype(np.float32, copy=False)
        return [row[:length] for row, length in zip(logits, lengths, strict=True)]

    def log_probabilities(self, prompt: Sequence[int]) -> torch.Tensor:
        """Log-probabilities after each prefix of ``prompt``: float32 ``[len(prompt), vocab_size]``."""
        return torch.from_numpy(self.step(self.new_cache(1, len(prompt)), [prompt])[0]).log_softmax(-1)

    def top_log_probabilities(self, prompts: Sequence[Sequence[int]], k: int) -> list[list[dict[int, float]]]:
        """See :class:`serving.engines.transformers.Engine`.

        Takes the ways that answers take in use: several prompts a batch, each with at most its last tokens one by one
        behind a prefill of the rest.
        """
        found = []
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            rows = self._prefill_and_decode(batch)
            found += [
                top_of(torch.from_numpy(row).log_softmax(-1), prompt, k)
                for row, prompt in zip(rows, batch, strict=True)
            ]
        return found

    def _prefill_and_decode(self, prompts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Logits after each token of each prompt, float32 ``[len(prompt), vocab_size]``."""
        cache = self.new_cache(len(prompts), min(max(map(len, prompts)) + _DECODED, self.settings.context_length))
        heads = [max(1, len(prompt) - _DECODED) for prompt in prompts]
        parts = [[logits] for logits in self.step(cache, [p[:head] for p, head in zip(prompts, heads, strict=True)])]
        for offset in range(_DECODED):
            # A row that is done goes on with its last token, to no effect on the others.
            tokens = [[p[min(head + offset, len(p) - 1)]] for p, head in zip(prompts, heads, strict=True)]
            for row, logits in zip(parts, self.step(cache, tokens), strict=True):
                row.append(logits)
        return [np.concatenate(row)[: len(prompt)] for row, prompt in zip(parts, prompts, strict=True)]

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """See :class:`serving.engines.transformers.Engine`."""
        return self.generate_batch([prompt], max_new_tokens)[0]

    def generate_batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens after each prompt, all in one batch; exactly ``max_new_tokens`` of each."""
        cache = self.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
        tokens: list[list[int]] = [[] for _ in prompts]
        step: Sequence[Sequence[int]] = prompts
        for _ in range(max_new_tokens):
            step = [[int(logits[-1].argmax())] for logits in self.step(cache, step)]
            for row, new in zip(tokens, step, strict=True):
                row += new
        return tokens

    def close(self) -> None:
        """Frees the session."""
        del self._session


def missing_provider(device: str) -> SenteiError | None:
    """Why ONNX Runtime cannot run a device's exports here; ``None`` if it can.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    found = import_onnx_library("onnxruntime").get_available_providers()
    if _PROVIDERS[device] in found:
        return None
    return SenteiError(
        f"This export is for {device}; ONNX Runtime here has no {_PROVIDERS[device]}, only {', '.join(found)}.",
        "Install onnxruntime-gpu in place of onnxruntime, and onnxruntime-genai-cuda in place of onnxruntime-genai: "
        "pip install 'sentei[onnx-gpu]'",
    )


def runs_on(directory: Path) -> str:
    """The device that an export can be run on here: its own, or else the CPU, if any."""
    device = read_settings(directory).device
    return device if missing_provider(device) is None else "cpu"


def _open_session(graph: Path, device: str) -> Any:
    if missing := missing_provider(device):
        raise missing
    ort = import_onnx_library("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong arrives as an exception
    # Between operations the cores are for others: an HTTP server and its clients, or the engine compared with.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(graph), options, providers=[_PROVIDERS[device]])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise damaged(graph.parent, error) from error
    if _PROVIDERS[device] not in session.get_providers():
        # It falls back to the CPU without a word.
        raise SenteiError(
            f"ONNX Runtime cannot start its {_PROVIDERS[device]} here, though it was built with it.",
            "Its CUDA and cuDNN must be installed in the versions it was built for: pip install "
            "'onnxruntime-gpu[cuda,cudnn]', or a torch for the same CUDA.",
        )
    return session
