"""A person's own metric: a Python function that is given the model."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolchain.errors import SenteiError


class FunctionMetric:
    """Calls ``function(model, tokenizer)``, which returns a number.

    Lower is better, unless the function has an attribute ``higher_is_better`` that is true. The model is run as a
    whole for every candidate: nothing can be shared between candidates that only the function sees.

    Attributes:
        name: ``package.module:function``, as in the plan.
        source: ``None``, and so is ``source_sha256``.
        higher_is_better: As the function says.
    """

    source = None
    source_sha256 = None

    def __init__(self, name: str, function: Callable[..., Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """``function`` is called with the model and ``tokenizer``."""
        self.name = name
        self.higher_is_better = bool(getattr(function, "higher_is_better", False))
        self._function, self._tokenizer = function, tokenizer

    def prepare(self, walk: object) -> None:
        """Needs nothing of the unpruned model."""

    def __call__(self, model: PreTrainedModel) -> float:
        """The function's number.

        Raises:
            SenteiError: The function raised, or returned no finite number.
        """
        try:
            value = self._function(model, self._tokenizer)
        except Exception as error:
            where = _place_of(error)
            raise SenteiError(f"--metric {self.name} raised {type(error).__name__}: {error} ({where}).") from error
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise SenteiError(f"--metric {self.name} returned {value!r}, which is not a number.") from error
        if not math.isfinite(number):
            raise SenteiError(f"--metric {self.name} returned {number}.", "It must return a finite number.")
        return number


def load_function(name: str) -> Callable[..., Any]:
    """Imports ``package.module:function``; modules in the current directory are found too.

    Raises:
        SenteiError: There is no such module or function.
    """
    module_name, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise SenteiError(f"--metric {name}: module {module_name} cannot be imported ({error}).") from error
    except AttributeError as error:
        raise SenteiError(f"--metric {name}: module {module_name} has no function {attribute!r}.") from error
    if not callable(function):
        raise SenteiError(f"--metric {name}: {attribute} is not a function.")
    return function


def _place_of(error: BaseException) -> str:
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name} line {trace.tb_lineno}"
