"""Models, data and plans: everything that decides what to prune and writes the pruned checkpoint.

For people who load a pruned checkpoint in Python: :func:`toolchain.load_model`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolchain.model.loading import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Imports torch and Transformers when they are asked for: vLLM's plugin needs neither from here."""
    if name not in __all__:
        raise AttributeError(f"module 'toolchain' has no attribute {name!r}")
    from toolchain.model import loading

    return getattr(loading, name)
