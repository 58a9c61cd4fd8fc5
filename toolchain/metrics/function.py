"""A person's own metric: a Python function that is given the model."""

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolchain.errors import SenteiError, is_out_of_memory
from toolchain.metrics.model_metric import ModelMetric

_LONGEST_REASON = 300


class FunctionMetric(ModelMetric):
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

    def __call__(self, model: PreTrainedModel) -> float:
        """The function's number.

        Raises:
            SenteiError: The function raised, or returned no finite number.
        """
        with _own_code(f"--metric {self.name}"):
            value = self._function(model, self._tokenizer)
        try:
            # A text that spells a number is a mistake of the function's, not a measurement.
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except Exception as error:  # whatever a class of the function's own raises
            raise self._no_number(value) from error
        if isinstance(value, str | bytes):
            raise self._no_number(value)
        if not math.isfinite(number):
            raise SenteiError(f"--metric {self.name} returned {number}.", "It must return a finite number.")
        return number

    def _no_number(self, value: object) -> SenteiError:
        shown = "None" if value is None else f"a value of type {type(value).__name__}"
        return SenteiError(f"--metric {self.name} returned {shown}, which is not a number.")


def load_function(name: str) -> Callable[..., Any]:
    """Imports ``package.module:function``; modules in the current directory are found too.

    Raises:
        SenteiError: There is no such module or function, or importing it failed.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise SenteiError(f"--metric {name!r} names no function.", "Write package.module:function.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        with _own_code(f"--metric {name}: module {module_name}"):
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise SenteiError(f"--metric {name}: module {module_name} cannot be imported ({error}).") from error
    try:
        function = getattr(module, attribute)
    except AttributeError as error:
        raise SenteiError(f"--metric {name}: module {module_name} has no function {attribute!r}.") from error
    if not callable(function):
        raise SenteiError(f"--metric {name}: {attribute} is not a function.")
    return function


@contextmanager
def _own_code(what: str) -> Iterator[None]:
    """Runs a person's own code: what it raises, or how it ends, is one sentence; what it prints goes to stderr.

    Stdout belongs to the command's result, which may be JSON.

    Raises:
        SenteiError: It raised, or called ``exit``.
        ImportError: It could not be imported.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}…"
        raise SenteiError(f"{what} raised {type(error).__name__}: {reason} ({_place_of(error)}).") from error


def _place_of(error: BaseException) -> str:
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name} line {trace.tb_lineno}"
