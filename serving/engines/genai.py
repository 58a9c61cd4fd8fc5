"""An ONNX export in onnxruntime-genai: tokens one by one, greedily or sampled."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.engines.onnxruntime import missing_provider
from serving.engines.sampling import GREEDY, Sampling
from serving.onnx_export.files import check_files, damaged, first_line, read_settings
from toolchain.errors import SenteiError
from toolchain.onnx_libraries import import_onnx_library

# What goes wrong arrives as an exception, and need not be on the terminal too.
_QUIET = '{"model": {"decoder": {"session_options": {"log_severity_level": 4}}}}'

_MOST_SEED = 2**31 - 1


class GenaiModel:
    """A loaded export. One thread at a time may use it."""

    def __init__(self, directory: Path) -> None:
        """Checks the files' hashes and loads the export.

        Raises:
            SenteiError: Files are missing, damaged or not to be trusted, or ONNX Runtime has not the export's device.
            MissingDependencyError: onnxruntime-genai is not installed.
        """
        self.settings = read_settings(directory)
        self._og: Any = import_onnx_library("onnxruntime_genai")
        if missing := missing_provider(self.settings.device):
            raise missing
        check_files(directory)
        self._directory = directory
        try:
            config = self._og.Config(str(directory))
            config.overlay(_QUIET)
            self._model = self._og.Model(config)
        except Exception as error:  # genai raises no class of its own
            raise damaged(directory, error) from error

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Checks that there is a prompt, and room for an answer.

        Raises:
            SenteiError: There is not.
        """
        if not prompt_ids:
            raise SenteiError("The prompt is empty.")
        if len(prompt_ids) >= self.settings.context_length:
            raise SenteiError(
                f"The prompt has {len(prompt_ids)} tokens; the model's context holds {self.settings.context_length}."
            )

    def stream(self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        """Tokens up to and with the end of sequence, or until ``max_new_tokens`` or the context's end.

        Args:
            prompt_ids: Token ids.
            max_new_tokens: At most this many.
            sampling: How they are picked.

        Raises:
            SenteiError: See :meth:`check_prompt`; while tokens are taken, onnxruntime-genai refuses.
        """
        self.check_prompt(prompt_ids)
        if sampling.seed is not None and sampling.seed > _MOST_SEED:
            raise SenteiError(
                f"Seed {sampling.seed} is more than onnxruntime-genai takes.", f"Give at most {_MOST_SEED}."
            )
        return self._tokens(prompt_ids, max_new_tokens, sampling)

    def _tokens(self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        options: dict[str, Any] = {
            "max_length": self.settings.cache_length(len(prompt_ids) + max_new_tokens),
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "do_sample": sampling.draws,
        }
        if sampling.draws:
            top_k = min(sampling.top_k, self.settings.vocab_size)
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": top_k}
            if sampling.seed is not None:
                options["random_seed"] = sampling.seed
        try:
            params = self._og.GeneratorParams(self._model)
            params.set_search_options(**options)
            generator = self._og.Generator(self._model, params)
            generator.append_tokens(np.asarray([prompt_ids], np.int32))
        except Exception as error:  # genai raises no class of its own
            raise self._failed(error) from error
        for _ in range(max_new_tokens):
            try:
                if generator.is_done():
                    return
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
            except Exception as error:
                raise self._failed(error) from error
            yield token

    def _failed(self, error: Exception) -> SenteiError:
        return SenteiError(f"{self._directory} failed in onnxruntime-genai ({first_line(error)}).")


def stream_tokens(
    directory: Path, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[int]:
    """Tokens of an export that is loaded for them alone; see :meth:`GenaiModel.stream`."""
    return GenaiModel(directory).stream(prompt_ids, max_new_tokens, sampling)
