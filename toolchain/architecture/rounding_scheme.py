"""Rounded matrices in the compressed-tensors format: which tensors stand for one, and of which shapes.

llm-compressor writes this format and vLLM reads it. Standard library only: the vLLM plugin imports this module.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.errors import SenteiError

METHOD = "compressed-tensors"
# What a linear layer of the format is made of; without `weight_shape`, which only repeats what the others tell.
WEIGHT_PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point")

_MOST = 2**16


@dataclass(frozen=True, kw_only=True)
class RoundingScheme:
    """How the matrices of a model are rounded.

    Attributes:
        num_bits: Of one weight.
        is_float: Whether its values are floating-point numbers (fp8) or integers.
        group_size: How many inputs share a scale; ``None`` where a whole row does.
        packed: Whether several weights share one int32.
        symmetric: Whether there are no zero points.
        input_bits: To how many bits what goes into the matrix is rounded, token by token; ``None`` if it is not.
    """

    num_bits: int
    is_float: bool
    group_size: int | None
    packed: bool
    symmetric: bool
    input_bits: int | None

    @property
    def name(self) -> str:
        """What ``sentei quantize --scheme`` calls it: ``fp8``, ``int8`` or ``w4a16``."""
        if self.input_bits == self.num_bits:
            return f"{'fp' if self.is_float else 'int'}{self.num_bits}"
        return f"w{self.num_bits}a{self.input_bits or 16}"

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that stand for one matrix, by the last word of their names."""
        scale = (out_features, 1 if self.group_size is None else math.ceil(in_features / self.group_size))
        columns = math.ceil(in_features * self.num_bits / 32)
        parts: dict[str, tuple[int, ...]] = {"weight_scale": scale}
        if self.packed:
            parts |= {"weight_packed": (out_features, columns), "weight_shape": (2,)}
        else:
            parts |= {"weight": (out_features, in_features)}
        if not self.symmetric:
            # Zero points are packed as well, along the rows.
            rows = math.ceil(out_features * self.num_bits / 32) if self.packed else out_features
            parts |= {"weight_zero_point": (rows, scale[1])}
        return parts


def rounding_schemes(config: Mapping[str, Any]) -> tuple[RoundingScheme, ...]:
    """The schemes in a ``config.json``, one a group of layers.

    Returns:
        None if it is not quantised, in another format, or with scales that are not one a row or one a group along it.

    Raises:
        SenteiError: The quantisation config is damaged.
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise SenteiError("config.json: quantization_config is damaged (it is no object).")
    if quantization.get("quant_method") != METHOD:
        return ()
    try:
        groups = list(quantization["config_groups"].values())
        if any(group["weights"]["strategy"] not in ("channel", "group") for group in groups):
            return ()
        return tuple(_scheme(group, group.get("format") or quantization.get("format")) for group in groups)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SenteiError(f"config.json: quantization_config is damaged ({type(error).__name__}: {error}).") from error


def _scheme(group: Mapping[str, Any], layout: str | None) -> RoundingScheme:
    weights, inputs = group["weights"], group.get("input_activations")
    numbers = [weights["num_bits"], weights["group_size"] if weights["strategy"] == "group" else 1]
    numbers += [inputs["num_bits"]] if inputs else []
    if not all(type(number) is int and 0 < number <= _MOST for number in numbers):
        raise TypeError(f"num_bits and group_size must be whole numbers from 1 to {_MOST}")
    return RoundingScheme(
        num_bits=weights["num_bits"],
        is_float=weights["type"] == "float",
        group_size=weights["group_size"] if weights["strategy"] == "group" else None,
        packed=layout == "pack-quantized",
        symmetric=weights["symmetric"] is True,
        input_bits=inputs["num_bits"] if inputs else None,
    )
