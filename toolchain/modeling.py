"""The old name of :func:`toolchain.load_model`, which the cards of earlier checkpoints give."""

from toolchain.model.loading import load_model

__all__ = ["load_model"]
