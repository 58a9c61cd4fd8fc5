"""What a quantised checkpoint holds: its rounded matrices, and inputs rounded as vLLM rounds them."""

import torch

from serving.verify.rounded import RoundedMatrices
from toolchain.architecture.rounding_scheme import RoundingScheme
from toolchain.checkpoint.directory import Checkpoint, same_bits
from toolchain.checkpoint.quantized import QuantizedCheckpoint


def rounded_matrices(exported: QuantizedCheckpoint) -> RoundedMatrices:
    """What an export rounded; matrices are read when they are asked for."""
    scheme = exported.scheme
    return RoundedMatrices(
        where=str(exported.directory),
        shapes=exported.matrices,
        formats=dict.fromkeys(exported.matrices, scheme.name),
        matrix=exported.matrix,
        round_inputs=None if scheme.input_bits is None else lambda inputs: round_inputs(inputs, scheme),
    )


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
        inputs: ``[..., in]``; rounded in float32, and returned in their own dtype.
        scheme: One that rounds inputs.
    """
    assert scheme.input_bits == 8
    largest = torch.finfo(torch.float8_e4m3fn).max if scheme.is_float else 127.0
    exact = inputs.float()
    scale = exact.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
    scaled = exact / scale
    rounded = scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).float() if scheme.is_float else scaled.round()
    return (rounded * scale).to(inputs.dtype)
