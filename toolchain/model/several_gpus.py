"""A model that one GPU cannot hold, in one process: accelerate spreads its layers over several of them.

Transformers loads each layer to its GPU. accelerate's hooks then move what enters a layer to where its weights are, so
states follow the layers; what is computed beside the model is the caller's to keep on one device.
"""

from collections.abc import Mapping

import torch

from toolchain.checkpoint.directory import Checkpoint, dtype_name
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.memory import available_bytes
from toolchain.model.loading import empty_model

# The rest is for what the model computes.
_SHARE_FOR_WEIGHTS = 0.8


class GpusTooSmallError(SenteiError):
    """There are several GPUs, and a model's layers do not fit into them."""


def device_map_for(
    checkpoint: Checkpoint, dtype: torch.dtype, free: Mapping[int, int] | None = None, *, computing: int = 0
) -> dict[str, str] | None:
    """The GPU of each part of a model that takes several; ``None`` where there is one, or the first has room for it.

    Args:
        checkpoint: The model.
        dtype: Computed in.
        free: Bytes that each GPU has for it, by number, the first one first; by default what all GPUs have now.
        computing: Bytes that each GPU needs beside weights; a fifth of what it has is left in any case.

    Raises:
        MissingDependencyError: It takes several, and accelerate is not installed.
        GpusTooSmallError: There are several, and they are too small together.
    """
    if free is None:
        free = {index: available_bytes(torch.device("cuda", index)) for index in range(torch.cuda.device_count())}
    usable = [max(0, min(int(_SHARE_FOR_WEIGHTS * each), each - computing)) for each in free.values()]
    num_bytes = checkpoint.num_parameters * dtype.itemsize
    if len(usable) < 2 or num_bytes <= usable[0]:
        return None
    places = _spread(checkpoint, dtype, {place: each for place, each in enumerate(usable) if each})
    if places is None:
        raise GpusTooSmallError(
            f"{checkpoint.directory} has {num_bytes / 1e9:.1f} GB of weights in {dtype_name(dtype)}, and "
            f"the {len(free)} GPUs have {sum(free.values()) / 1e9:.1f} GB free together, of which a fifth is for "
            "computing.",
            "Use --offload for perplexity, a smaller --dtype, or --device cpu.",
        )
    numbers = list(free)
    return {part: f"cuda:{numbers[place]}" for part, place in places.items()}


def _spread(checkpoint: Checkpoint, dtype: torch.dtype, usable: Mapping[int, int]) -> dict[str, int] | None:
    """Whole layers on each GPU, evenly if that fits; ``None`` if nothing does. ``usable``: bytes of each GPU."""
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError as missing:
        raise MissingDependencyError("accelerate, which spreads a model over several GPUs,", "eval") from missing
    model = empty_model(checkpoint)
    model.tie_weights()  # what shares a tensor goes to one GPU
    whole = list(model._no_split_modules or ())
    even = get_balanced_memory(model, dict(usable), whole, dtype=dtype)
    for limits in ({index: even[index] for index in usable}, usable):
        found = infer_auto_device_map(model, dict(limits), whole, dtype=dtype)
        if set(found.values()) <= set(usable):  # otherwise the rest is on disk
            return dict(found)
    return None
