"""Which layers attend to the last tokens alone, and to how many: as Transformers' class of the family reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from toolchain.errors import SenteiError, reason_of

# Where layers are of two kinds, these say which is which: a list, or a rule for families that have one.
_KINDS = ("layer_types", "use_sliding_window", "max_window_layers", "sliding_window_pattern")


@dataclass(frozen=True)
class SlidingWindow:
    """A model's sliding attention.

    Attributes:
        tokens: That a layer attends to at most, the newest included.
        layers: Whether each layer does.
    """

    tokens: int
    layers: tuple[bool, ...]


def sliding_window(config: Mapping[str, Any]) -> SlidingWindow | None:
    """Reads ``config.json``; ``None`` where every layer attends to all tokens.

    Args:
        config: Of a family that sentei knows.

    Raises:
        SenteiError: Transformers cannot read it, or a window is of fewer tokens than none.
    """
    num_layers = config["num_hidden_layers"]
    family = AutoConfig.for_model(config["model_type"])
    if not hasattr(family, "sliding_window"):
        return None
    keys = ("sliding_window", *(_KINDS if hasattr(family, "layer_types") else ()))
    try:
        known = AutoConfig.for_model(
            config["model_type"], num_hidden_layers=num_layers, **{key: config[key] for key in keys if key in config}
        )
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as error:
        raise SenteiError(f"config.json: its sliding window cannot be read ({reason_of(error)}).") from error
    if (known.sliding_window or 0) < 0:
        raise SenteiError(f"config.json: its sliding window cannot be read ({known.sliding_window} tokens).")
    kinds = getattr(known, "layer_types", None) or ["sliding_attention"] * num_layers
    layers = tuple(kind == "sliding_attention" for kind in kinds)
    return SlidingWindow(known.sliding_window, layers) if known.sliding_window and any(layers) else None
