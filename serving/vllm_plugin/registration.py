"""vLLM's entry point (group ``vllm.general_plugins``): tells every vLLM process which classes build pruned checkpoints.

They carry names of our own in ``architectures``, so nothing changes for any other model on the same server.
"""

import os
from typing import Any

from toolchain.architecture.families import FAMILIES
from toolchain.lifetime import ENGINE_VARIABLE, end_with_multiprocessing_parent


def register() -> None:
    """Registers the classes by name, so that nothing of vLLM's models is imported before one is asked for."""
    if os.environ.get(ENGINE_VARIABLE):  # a server that others started lives as long as they want
        end_with_multiprocessing_parent()
    from transformers import CONFIG_MAPPING
    from vllm import ModelRegistry

    for model_type, family in FAMILIES.items():
        architecture = family.pruned_architecture
        ModelRegistry.register_model(architecture, f"serving.vllm_plugin.models:{architecture}")
        _equal_to_itself(CONFIG_MAPPING[model_type])


def _equal_to_itself(config_class: Any) -> None:
    """Lets a config be compared with itself without being read.

    vLLM before 0.28 compares ``hf_config`` with ``hf_text_config``, the same object. Transformers compares field by
    field, and a global width that ``per_layer_config`` overrides cannot be read.
    """
    compare = config_class.__eq__

    def equal(self: object, other: object) -> Any:
        return self is other or compare(self, other)

    config_class.__eq__ = equal
