"""An export's rounded matrices: how far they are from their source's, and a model that computes with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.directory import Checkpoint
from toolchain.checkpoint.rounding_error import RoundedMatrix, measure_rounding
from toolchain.errors import SenteiError

HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class RoundedMatrices:
    """What an export rounded, matrix by matrix, in the checkpoint's words.

    Attributes:
        where: The export's file or directory, for messages.
        shapes: ``(out, in)`` by the name of the weight; the head's is ``lm_head.weight`` even where it is tied.
        formats: By name, a key of :data:`toolchain.checkpoint.rounding_error.ROUNDING_LIMITS`.
        matrix: What a matrix stands for: float32 ``[out, in]``, on the CPU.
        round_inputs: How what goes into a matrix is rounded, ``[..., in]``; ``None`` if it is not.
        embeds_with_head: Whether tokens are looked up in the head's matrix.
    """

    where: str
    shapes: Mapping[str, tuple[int, int]]
    formats: Mapping[str, str]
    matrix: Callable[[str], torch.Tensor]
    round_inputs: Callable[[torch.Tensor], torch.Tensor] | None = None
    embeds_with_head: bool = False


def source_weight(source: Checkpoint, name: str) -> torch.Tensor:
    """A weight of a checkpoint as stored; a tied head is the embedding."""
    stored = _EMBEDDING if name == HEAD and HEAD not in source.tensors else name
    return source.read(stored)


def distances(source: Checkpoint, rounded: RoundedMatrices) -> list[RoundedMatrix]:
    """How far each matrix is from the source's.

    Raises:
        SenteiError: The matrices are not those of the source.
    """
    found = []
    for name, shape in rounded.shapes.items():
        if name not in source.tensors and name != HEAD:
            raise SenteiError(f"{rounded.where} has a matrix {name}, which the checkpoint has not.")
        weight = source_weight(source, name)
        if weight.shape != shape:
            raise SenteiError(
                f"{rounded.where}: {name} has shape {list(shape)}, the checkpoint's {list(weight.shape)}."
            )
        found.append(measure_rounding(name, rounded.formats[name], rounded.matrix(name), weight.float()))
    return found


@torch.no_grad()
def carry(module: nn.Module, rounded: RoundedMatrices, *, prefix: str = "", outside: str | None = None) -> None:
    """Puts rounded matrices in the place of a module's own.

    Args:
        module: A model, or one of its decoder layers; changed in place, on its device and in its dtype.
        rounded: The matrices.
        prefix: What comes before the module's own names in the matrices' names.
        outside: Matrices whose names begin with this are left out.
    """
    for name in rounded.shapes:
        if not name.startswith(prefix) or (outside is not None and name.startswith(outside)):
            continue
        linear = module.get_submodule(name.removeprefix(prefix).removesuffix(".weight"))
        assert isinstance(linear, nn.Linear)
        # A new parameter, not new values in the old one: that may be the embedding's too.
        linear.weight = nn.Parameter(rounded.matrix(name).to(linear.weight), requires_grad=False)
        if name == HEAD and rounded.embeds_with_head:
            module.get_submodule(_EMBEDDING.removesuffix(".weight")).weight = linear.weight


def round_inputs(model: nn.Module, rounded: RoundedMatrices) -> None:
    """Has a model round what goes into its rounded matrices, from now on."""
    rounding = rounded.round_inputs
    if rounding is None:
        return

    def hook(linear: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return rounding(arguments[0]), *arguments[1:]

    for name in rounded.shapes:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook)
