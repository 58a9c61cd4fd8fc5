"""vLLM's entry point (group ``vllm.general_plugins``): tells every vLLM process which classes build pruned checkpoints.

They carry names of our own in ``architectures``, so nothing changes for any other model on the same server.
"""

import os
import sys
from contextlib import suppress
from typing import Any

from serving.vllm_plugin.batch_invariance import ask_with_each_width
from toolchain.architecture.families import FAMILIES
from toolchain.lifetime import ENGINE_VARIABLE, end_with_multiprocessing_parent


def register() -> None:
    """Registers the classes by name, so that nothing of vLLM's models is imported before one is asked for."""
    if os.environ.get(ENGINE_VARIABLE):  # a server that others started lives as long as they want
        end_with_multiprocessing_parent()
    _keep_working_directory_off_the_path()
    from transformers import CONFIG_MAPPING
    from vllm import ModelRegistry

    for model_type, family in FAMILIES.items():
        architecture = family.pruned_architecture
        ModelRegistry.register_model(architecture, f"serving.vllm_plugin.families.{model_type}:{architecture}")
        _equal_to_itself(CONFIG_MAPPING[model_type])
    ask_with_each_width()


def _keep_working_directory_off_the_path() -> None:
    """Lets child processes import from where this one does.

    vLLM looks at a model's class in a child that it starts with ``python -m``. Python puts the working directory first
    on such a child's path, even if it is not on this process's path, as with ``vllm serve``. A user's own folder
    ``serving`` in that directory would then be imported in place of sentei's.
    """
    with suppress(FileNotFoundError):  # the working directory was deleted
        if {"", os.getcwd()}.isdisjoint(sys.path):  # noqa: PTH109 (the same spelling as on the path)
            os.environ.setdefault("PYTHONSAFEPATH", "1")


def _equal_to_itself(config_class: Any) -> None:
    """Lets a config be compared with itself without being read.

    vLLM before 0.28 compares ``hf_config`` with ``hf_text_config``, the same object. Transformers compares field by
    field, and a global width that ``per_layer_config`` overrides cannot be read.
    """
    compare = config_class.__eq__

    def equal(self: object, other: object) -> Any:
        return self is other or compare(self, other)

    config_class.__eq__ = equal
