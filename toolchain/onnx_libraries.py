"""The one door to ONNX Runtime's libraries: their telemetry is off before they are loaded.

Once loaded, onnxruntime writes an identity into the home directory and sends events to its maker. Only
``ORT_DISABLE_TELEMETRY``, which the library reads while it is loaded, prevents both. Importing this module sets it,
unless the user has set it. Import this module before anything that loads onnxruntime or onnxruntime-genai.
"""

import importlib
import os
from typing import Any, Literal

from toolchain.errors import MissingDependencyError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def import_onnx_library(name: Literal["onnx", "onnxruntime", "onnxruntime_genai"]) -> Any:
    """Imports a library of the ``onnx`` extra.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(name.replace("_", "-"), "onnx") from error
