"""ONNX exports: plain ONNX Runtime, whose logits can be compared, and onnxruntime-genai, which streams tokens."""

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serving.engines import top_of
from toolchain.errors import MissingDependencyError, SenteiError

# Arrays by cache input name, float32 [batch, num_key_value_heads, past_tokens, head_size]
Cache = Mapping[str, NDArray[np.float32]]
_CACHE_INPUT = re.compile(r"past_key_values\.\d+\.(key|value)")


class OnnxEngine:
    """An ONNX export in a plain ``onnxruntime.InferenceSession`` on the CPU."""

    name = "onnx"

    def __init__(self, directory: Path) -> None:
        """Opens the export.

        Raises:
            SenteiError: Files are missing or damaged.
            MissingDependencyError: onnxruntime is not installed.
        """
        settings = _read_settings(directory)
        self._directory = directory
        self._session = _open_session(directory / settings.filename)
        # Which layers have a cache is the graph's to say: layers without attention leave gaps in the numbering.
        names = [each.name for each in self._session.get_inputs() if _CACHE_INPUT.fullmatch(each.name)]
        self._no_past = {
            name: np.zeros((1, settings.num_key_value_heads, 0, settings.head_size), np.float32) for name in names
        }
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in names)]

    @property
    def attending_layers(self) -> list[int]:
        """The layers that have a KV cache, ascending."""
        return sorted({int(name.split(".")[1]) for name in self._no_past})

    def step(self, tokens: Sequence[int], past: Cache | None = None) -> tuple[NDArray[np.float32], Cache]:
        """Runs tokens of one sequence after those already in the cache.

        Args:
            tokens: The next tokens, one or more.
            past: The cache so far; ``None`` starts a sequence.

        Returns:
            Logits after each of the tokens, float32 ``[len(tokens), vocab_size]``, and the longer cache.

        Raises:
            SenteiError: ONNX Runtime refuses, such as for more tokens than the context holds.
        """
        past = past or self._no_past
        num_past = next(iter(past.values())).shape[2] if past else 0
        inputs = {
            "input_ids": np.asarray([tokens], np.int64),
            "attention_mask": np.ones((1, num_past + len(tokens)), np.int64),
            **past,
        }
        try:
            logits, *present = self._session.run(self._outputs, inputs)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise SenteiError(f"{self._directory} failed in ONNX Runtime ({_first_line(error)}).") from error
        return logits[0], dict(zip(self._no_past, present, strict=True))

    def log_probabilities(self, prompt: Sequence[int]) -> torch.Tensor:
        """Log-probabilities after each prefix of ``prompt``: float32 ``[len(prompt), vocab_size]``."""
        return torch.from_numpy(self.step(prompt)[0]).log_softmax(-1)

    def top_log_probabilities(self, prompts: Sequence[Sequence[int]], k: int) -> list[list[dict[int, float]]]:
        """See :class:`serving.engines.Engine`."""
        return [top_of(self.log_probabilities(prompt), prompt, k) for prompt in prompts]

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """See :class:`serving.engines.Engine`."""
        tokens: list[int] = []
        logits, past = self.step(prompt)
        while len(tokens) < max_new_tokens:
            if tokens:
                logits, past = self.step(tokens[-1:], past)
            tokens.append(int(logits[-1].argmax()))
        return tokens

    def close(self) -> None:
        """Frees the session."""
        del self._session


def stream_tokens(directory: Path, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
    """Greedy tokens from onnxruntime-genai, one by one, until end of sequence or ``max_new_tokens``.

    Args:
        directory: An ONNX export.
        prompt_ids: Token ids, at least one.
        max_new_tokens: At most this many.

    Raises:
        SenteiError: Files are missing or damaged, or the prompt leaves no room in the context.
        MissingDependencyError: onnxruntime-genai is not installed.
    """
    context_length = _read_settings(directory).context_length
    if len(prompt_ids) >= context_length:
        raise SenteiError(f"The prompt has {len(prompt_ids)} tokens; the model's context holds {context_length}.")
    try:
        og: Any = importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        raise MissingDependencyError("onnxruntime-genai", "onnx") from error
    try:
        model = og.Model(str(directory))
    except Exception as error:  # genai raises no class of its own
        raise _damaged(directory, error) from error
    params = og.GeneratorParams(model)
    # The KV cache is allocated for max_length at once, so never the whole context.
    max_length = min(context_length, len(prompt_ids) + max_new_tokens)
    params.set_search_options(do_sample=False, num_beams=1, repetition_penalty=1.0, max_length=max_length)
    generator = og.Generator(model, params)
    generator.append_tokens(np.asarray([prompt_ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


@dataclass(frozen=True, kw_only=True)
class _Settings:
    filename: str
    head_size: int
    num_key_value_heads: int
    context_length: int


def _read_settings(directory: Path) -> _Settings:
    path = directory / "genai_config.json"
    if not path.is_file():
        raise SenteiError(f"{directory} has no genai_config.json.", "Give a directory that sentei export onnx wrote.")
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        return _Settings(
            filename=str(decoder["filename"]),
            head_size=int(decoder["head_size"]),
            num_key_value_heads=int(decoder["num_key_value_heads"]),
            context_length=int(model["context_length"]),
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SenteiError(f"{path} is damaged ({type(error).__name__}: {error}).", "Export the model again.") from error


def _open_session(graph: Path) -> Any:
    try:
        ort: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "onnx") from error
    if not graph.is_file():
        raise SenteiError(f"{graph} does not exist.", "Export the model again.")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong arrives as an exception
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise _damaged(graph.parent, error) from error


def _damaged(directory: Path, error: Exception) -> SenteiError:
    return SenteiError(
        f"{directory} cannot be loaded by ONNX Runtime ({_first_line(error)}).", "Export the model again."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
