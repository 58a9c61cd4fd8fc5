"""What a quantised export computes, in the source model: its rounded matrices, and inputs rounded as in vLLM."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolchain.architecture.rounding_scheme import RoundingScheme
from toolchain.checkpoint.directory import Checkpoint, same_bits
from toolchain.checkpoint.quantized import QuantizedCheckpoint
from toolchain.checkpoint.rounding_error import RoundedMatrix, measure_rounding
from toolchain.errors import SenteiError


@torch.no_grad()
def replace_with_rounded(model: PreTrainedModel, exported: QuantizedCheckpoint) -> list[RoundedMatrix]:
    """Puts an export's matrices into the source model, which then computes what the export should.

    Args:
        model: The source, float32; changed in place.
        exported: What was made of it.

    Returns:
        How far each matrix was from the source's.

    Raises:
        SenteiError: The export's matrices are not those of the model.
    """
    found = []
    for name, shape in exported.matrices.items():
        try:
            linear = model.get_parameter(name)
        except AttributeError as error:
            raise SenteiError(f"{exported.directory} has a matrix {name}, which the checkpoint has not.") from error
        if linear.shape != shape:
            raise SenteiError(
                f"{exported.directory}: {name} has shape {list(shape)}, the checkpoint's {list(linear.shape)}."
            )
        rounded = exported.matrix(name)
        found.append(measure_rounding(name, exported.scheme.name, rounded, linear))
        linear.copy_(rounded)
        if exported.scheme.input_bits is not None:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(_rounding_hook(exported.scheme))
    return found


def count_differing(source: Checkpoint, exported: QuantizedCheckpoint) -> int:
    """Tensors that are not rounded and yet are not their source's, cast; a tied head may be stored or not."""
    expected, found = set(source.tensors) - set(exported.matrices), set(exported.tensors) - exported.parts
    tied = {"lm_head.weight"} if source.config.get("tie_word_embeddings", False) else set()
    count = len((expected ^ found) - tied)
    for name in expected & found:
        tensor = exported.read(name)
        count += not same_bits(source.read(name).to(tensor.dtype), tensor)
    return count


def round_inputs(inputs: torch.Tensor, scheme: RoundingScheme) -> torch.Tensor:
    """Rounds each token's inputs, as vLLM does while it runs: symmetric, the largest one to the largest number.

    Args:
        inputs: float32 ``[..., in]``.
        scheme: One that rounds inputs.
    """
    assert scheme.input_bits == 8
    largest = torch.finfo(torch.float8_e4m3fn).max if scheme.is_float else 127.0
    scale = inputs.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
    scaled = inputs / scale
    if scheme.is_float:
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).to(inputs.dtype) * scale
    return scaled.round() * scale


def _rounding_hook(scheme: RoundingScheme) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return round_inputs(arguments[0], scheme), *arguments[1:]

    return hook
