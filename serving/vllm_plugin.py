"""vLLM's entry point (group ``vllm.general_plugins``): tells every vLLM process which classes build pruned checkpoints.

They carry names of our own in ``architectures``, so nothing changes for any other model on the same server.
"""

from toolchain.families import FAMILIES


def register() -> None:
    """Registers the classes by name, so that nothing of vLLM's models is imported before one is asked for."""
    from vllm import ModelRegistry

    for family in FAMILIES.values():
        architecture = family.pruned_architecture
        ModelRegistry.register_model(architecture, f"serving.vllm_models:{architecture}")
