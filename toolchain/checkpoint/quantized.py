"""Quantised model directories (compressed-tensors format), read back as what they stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolchain.architecture.families import Family, family_of
from toolchain.architecture.layout import LayerLayout, read_layout
from toolchain.architecture.rounding_scheme import RoundingScheme, rounding_schemes
from toolchain.architecture.tensor_check import check_layer_tensors
from toolchain.checkpoint.directory import Checkpoint, TensorInfo, open_checkpoint, read_config, read_headers
from toolchain.checkpoint.safetensors_writer import DTYPES
from toolchain.errors import SenteiError

_DTYPES = {**DTYPES, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """An opened and checked quantised directory; its weights stay on disk.

    Attributes:
        directory: Where it is.
        config: ``config.json`` as written.
        family: Its entry in the table of families.
        layout: One entry a decoder layer.
        scheme: How its matrices are rounded.
        matrices: Shapes ``(out, in)`` of the rounded ones, by the name the weight had.
        tensors: Everything that is stored, by name.
    """

    directory: Path
    config: Mapping[str, Any]
    family: Family
    layout: tuple[LayerLayout, ...]
    scheme: RoundingScheme
    matrices: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, TensorInfo]

    @property
    def dtype(self) -> torch.dtype:
        """What to compute in: that of the norms, but 16 bits, since kernels for rounded matrices know nothing wider."""
        prefix = f"{self.family.layers}."
        norms = (i.dtype for name, i in self.tensors.items() if name.startswith(prefix) and "norm" in name)
        stored = next(norms, torch.bfloat16)
        return stored if stored.itemsize == 2 else torch.bfloat16

    @property
    def weight_bytes(self) -> int:
        """Size of all stored tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, as if none were rounded, by name."""
        parts = self.parts
        return {**{name: info.shape for name, info in self.tensors.items() if name not in parts}, **self.matrices}

    @property
    def parts(self) -> set[str]:
        """Names of the tensors that stand for rounded matrices; every other one is a weight as it is."""
        return {
            f"{name.removesuffix('.weight')}.{part}"
            for name, shape in self.matrices.items()
            for part in self.scheme.parts(*shape)
        }

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor as stored.

        Raises:
            SenteiError: The file is damaged.
        """
        return self.tensors[name].read(name)

    def matrix(self, name: str) -> torch.Tensor:
        """What a rounded matrix stands for: float32 ``[out, in]``.

        Raises:
            SenteiError: The file is damaged.
        """
        module, shape = name.removesuffix(".weight"), self.matrices[name]
        values = (
            unpack(self.read(f"{module}.weight_packed"), self.scheme.num_bits, shape[1])
            if self.scheme.packed
            else self.read(f"{module}.weight").float()
        )
        scale = self.read(f"{module}.weight_scale").float()
        return values * scale.repeat_interleave(self.scheme.group_size or shape[1], dim=1)[:, : shape[1]]


def unpack(packed: torch.Tensor, num_bits: int, in_features: int) -> torch.Tensor:
    """Takes small integers out of int32s, the first one from the lowest bits, and moves them to around 0.

    Args:
        packed: int32 ``[out, ceil(in_features * num_bits / 32)]``.
        num_bits: 2, 4 or 8.
        in_features: How many are in a row.

    Returns:
        float32 ``[out, in_features]`` from ``-2 ** (num_bits - 1)`` upwards.
    """
    assert 32 % num_bits == 0
    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32)
    values = (packed.unsqueeze(-1) >> shifts) & ((1 << num_bits) - 1)
    return values.flatten(1)[:, :in_features].float() - (1 << (num_bits - 1))


def is_quantized(directory: Path) -> bool:
    """Whether a directory's config says that its weights are quantised, in whatever format.

    Raises:
        SenteiError: There is no ``config.json``, or it is damaged.
    """
    return bool(read_config(directory).get("quantization_config"))


def open_quantized(directory: Path) -> QuantizedCheckpoint:
    """Opens what ``sentei quantize`` wrote; checks config, layout and the shape of every tensor of every matrix.

    Raises:
        SenteiError: Another format, several schemes, missing or left-over tensors, or shapes that do not fit.
    """
    config = read_config(directory)
    family, layout, schemes = family_of(config), read_layout(config), set(rounding_schemes(config))
    if len(schemes) != 1 or not (scheme := schemes.pop()).symmetric:
        raise SenteiError(
            f"{directory}: sentei reads symmetric compressed-tensors checkpoints with one scheme for all layers.",
            "Quantise the pruned model with sentei quantize.",
        )
    tensors = read_headers(directory, _DTYPES)
    matrices = _matrices(directory, scheme, tensors)
    opened = QuantizedCheckpoint(directory, config, family, layout, scheme, matrices, tensors)
    check_layer_tensors(str(directory), family, layout, opened.shapes)
    return opened


def open_servable(directory: Path) -> Checkpoint | QuantizedCheckpoint:
    """Opens what an inference server may be given: a checkpoint, quantised or not.

    Raises:
        SenteiError: It is neither.
    """
    return open_quantized(directory) if is_quantized(directory) else open_checkpoint(directory)


def _matrices(directory: Path, scheme: RoundingScheme, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """Finds the rounded matrices by their scales, and checks the tensors of each."""
    found: dict[str, tuple[int, int]] = {}
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if kind != "weight_scale":
            continue
        shape = _shape(directory, scheme, tensors, module)
        for part, wanted in scheme.parts(*shape).items():
            info = tensors.get(f"{module}.{part}")
            if info is None:
                raise SenteiError(f"{directory}: there is no tensor {module}.{part}.")
            if info.shape != wanted:
                raise SenteiError(
                    f"{directory}: {module}.{part} has shape {list(info.shape)}; a matrix {list(shape)} needs "
                    f"{list(wanted)}."
                )
        found[f"{module}.weight"] = shape
    return found


def _shape(directory: Path, scheme: RoundingScheme, tensors: Mapping[str, TensorInfo], module: str) -> tuple[int, int]:
    name = f"{module}.{'weight_shape' if scheme.packed else 'weight'}"
    if name not in tensors:
        raise SenteiError(f"{directory}: there is no tensor {name}.")
    info = tensors[name]
    shape: Sequence[Any] = info.shape
    if scheme.packed:
        # Two numbers, which is why it may be read before anything is known.
        shape = info.read(name).tolist() if info.shape == (2,) and not info.dtype.is_floating_point else ()
    if len(shape) != 2 or min(shape) < 1:
        raise SenteiError(f"{directory}: {name} does not describe a matrix.")
    return int(shape[0]), int(shape[1])
