"""What a checkpoint's ``per_layer_config`` says of each layer: attention or not, and the FFN's width.

The vocabulary is Transformers' (5.14 and later), as in ``{"05": {"intermediate_size": 1024}, "27": {"skip":
["attention"]}}``. Standard library only: the vLLM plugin imports this module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.errors import SenteiError

# Far above every model there is: 126 layers, width 53248, vocabulary 262144. Layers are counted out before any weight
# is looked at, so their number is bounded by what that takes.
MOST_LAYERS, LARGEST = 1000, 2**24
_DIMENSIONS = {
    "hidden_size": LARGEST, "vocab_size": LARGEST, "num_attention_heads": 2**12, "num_key_value_heads": 2**12,
    "head_dim": LARGEST, "max_position_embeddings": 2**31, "sliding_window": 2**31,
}  # fmt: skip
# What may be null, or left to the family's default.
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
# Transformers names that many labels, one after the other, for whatever model it is.
_LABELS, _MOST_LABELS = "num_labels", 100_000
_SKIPPABLE = {"attention", "mlp"}
# In skipped layers `attention_dropout` differs from the global value when no width does: reading the global one then
# raises in stock Transformers, which would otherwise load such a checkpoint with random attention weights.
_ALLOWED_KEYS = {"intermediate_size", "skip", "attention_dropout"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLayout:
    """One decoder layer's shape.

    Attributes:
        attention: Whether the layer attends.
        intermediate_size: FFN neurons; 0 when the FFN is removed whole.
    """

    attention: bool
    intermediate_size: int


def read_layout(config: Mapping[str, Any]) -> tuple[LayerLayout, ...]:
    """Reads every layer's shape from a ``config.json`` mapping, pruned or not.

    Raises:
        SenteiError: ``per_layer_config`` names a layer, key, skip or width that does not exist, or a dimension of the
            model is no number that a model can have.
    """
    num_hidden_layers = positive(config, "num_hidden_layers", at_most=MOST_LAYERS)
    width = positive(config, "intermediate_size")
    check_dimensions(config)
    overrides = config.get("per_layer_config") or {}
    if not isinstance(overrides, Mapping):
        raise SenteiError("config.json: per_layer_config must be an object that maps layer indices to overrides.")
    by_layer: dict[int, Mapping[str, Any]] = {}
    for key, override in overrides.items():
        layer = _layer_number(str(key), num_hidden_layers)
        if layer in by_layer:
            raise SenteiError(f"config.json: per_layer_config names layer {layer} twice.")
        by_layer[layer] = override
    return tuple(_read_layer(layer, by_layer.get(layer, {}), width) for layer in range(num_hidden_layers))


def positive(config: Mapping[str, Any], key: str, *, at_most: int = LARGEST) -> int:
    """A dimension out of a ``config.json`` mapping.

    Raises:
        SenteiError: It is missing, no whole number above 0, or larger than any model's.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SenteiError(f"config.json: {key} is {value!r}, not a positive whole number.")
    if value > at_most:
        raise SenteiError(f"config.json: {key} is {value}, and no model is known with more than {at_most:,}.")
    return value


def check_dimensions(config: Mapping[str, Any]) -> None:
    """Checks those dimensions that are given; what is computed from a missing one says so itself.

    Raises:
        SenteiError: One is no number that a model can have.
    """
    if "num_hidden_layers" in config:
        positive(config, "num_hidden_layers", at_most=MOST_LAYERS)
    for key, most in _DIMENSIONS.items():
        if key in config and not (key in _OPTIONAL and config[key] is None):
            positive(config, key, at_most=most)
    if config.get(_LABELS) is not None:
        positive(config, _LABELS, at_most=_MOST_LABELS)
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise SenteiError(
            f"config.json: num_attention_heads is {heads}, which num_key_value_heads, {kv_heads}, does not divide."
        )


def write_per_layer_config(layout: Sequence[LayerLayout], config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Writes ``per_layer_config`` such that a loader that does not know it refuses the checkpoint.

    Args:
        layout: One entry a layer.
        config: The original ``config.json``; its ``intermediate_size`` stays the global one.

    Returns:
        Overrides by zero-padded layer index (Transformers' own spelling); empty when nothing is pruned.
    """
    width = config["intermediate_size"]
    digits = len(str(len(layout) - 1))
    widths_differ = any(0 < layer.intermediate_size < width for layer in layout)
    overrides: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(layout):
        override: dict[str, Any] = {}
        skip = [
            name for name, gone in (("attention", not layer.attention), ("mlp", layer.intermediate_size == 0)) if gone
        ]
        if 0 < layer.intermediate_size < width:
            override["intermediate_size"] = layer.intermediate_size
        if skip:
            override["skip"] = skip
            if not widths_differ:
                override["attention_dropout"] = 0.5 if config.get("attention_dropout", 0.0) != 0.5 else 0.25
        if override:
            overrides[str(index).zfill(digits)] = override
    return overrides


def _read_layer(layer: int, override: Mapping[str, Any], global_width: int) -> LayerLayout:
    where = f"config.json: per_layer_config of layer {layer}"
    if not isinstance(override, Mapping):
        raise SenteiError(f"{where} must be an object.")
    if unknown := sorted(set(override) - _ALLOWED_KEYS):
        raise SenteiError(f"{where} has {unknown}; known are {sorted(_ALLOWED_KEYS)}.")
    skip = override.get("skip", [])
    if not isinstance(skip, (list, tuple, set)) or not all(isinstance(s, str) and s in _SKIPPABLE for s in skip):
        raise SenteiError(f"{where} skips {skip!r}; what can be skipped is {sorted(_SKIPPABLE)}.")
    width = override.get("intermediate_size", global_width)
    if not isinstance(width, int) or isinstance(width, bool) or not 0 <= width <= global_width:
        raise SenteiError(f"{where}: intermediate_size {width!r} is not a whole number from 1 to {global_width}.")
    if width == 0 and "mlp" not in skip:
        raise SenteiError(f"{where}: intermediate_size is 0.", 'Write "skip": ["mlp"] to remove the whole FFN.')
    return LayerLayout(attention="attention" not in skip, intermediate_size=0 if "mlp" in skip else width)


def _layer_number(key: str, num_hidden_layers: int) -> int:
    # Digits of other scripts are refused: other readers of the same file do not take them for numbers.
    if key.isascii() and key.isdecimal() and len(key) <= len(str(MOST_LAYERS)) and int(key) < num_hidden_layers:
        return int(key)
    raise SenteiError(
        f"config.json: per_layer_config names layer {key!r}, but num_hidden_layers is {num_hidden_layers}."
    )
