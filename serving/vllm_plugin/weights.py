"""What vLLM's loaders let pass: tensors that are missing, left over or too large. Checked before and while loading."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from toolchain.architecture.families import Family
from toolchain.architecture.layout import LayerLayout
from toolchain.architecture.rounding_scheme import WEIGHT_PARTS, RoundingScheme
from toolchain.architecture.tensor_check import layer_index
from toolchain.errors import SenteiError, reason_of
from toolchain.safetensors_files import check_header_size, shards_in


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name, from the headers of a directory's safetensors; empty if it has none complete.

    Raises:
        SenteiError: The index or a file is damaged.
    """
    index = directory / "model.safetensors.index.json"
    names = shards_in(index) if index.is_file() else ["model.safetensors"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        if not (path := directory / name).is_file():
            return {}
        check_header_size(path)
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SenteiError(
                f"{path} is corrupt or truncated ({reason_of(error)}).", "Download or copy it again."
            ) from error
    return shapes


class CompleteWeights(nn.Module):
    """Mixin for vLLM models: every tensor of the checkpoint is used whole, and every weight comes from it.

    vLLM alone (0.32) cuts tensors that are too large, drops biases it has no place for, and does not miss a linear
    layer's weight, which then keeps whatever was in memory. Of a rounded weight that holds for each of its parts.
    """

    layout: Sequence[LayerLayout]
    family: Family
    schemes: Sequence[RoundingScheme] = ()
    _complete = False

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads and checks; later calls on the same model, as in weight updates, may be partial.

        Raises:
            SenteiError: A tensor is missing, left over, or of another width than the config says.
        """
        # This is asked before loading, because vLLM's online quantisation adds parameters to a layer as it loads it.
        wanted = self._wanted() if not self._complete else set()
        seen: set[str] = set()
        loaded = super().load_weights(self._observe(weights, seen))  # type: ignore[misc]
        if not self._complete:
            self._check_complete(wanted, seen)
            self._complete = True
        return loaded

    def _observe(
        self, weights: Iterable[tuple[str, torch.Tensor]], seen: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            seen.add(name)
            self._check_width(name, tensor)
            yield name, tensor

    def _check_width(self, name: str, tensor: torch.Tensor) -> None:
        if not name.startswith(f"{self.family.layers}."):
            return
        number, _, rest = name.removeprefix(f"{self.family.layers}.").partition(".")
        if (index := layer_index(number, len(self.layout))) is None:
            raise SenteiError(
                f"The checkpoint holds more layers than num_hidden_layers = {len(self.layout)} says: it has {name}."
            )
        module, _, part = rest.rpartition(".")
        if (side := self.family.neuron_side(f"{module}.bias" if part == "bias" else f"{module}.weight")) is None:
            return
        dimension, entries = side
        width = self.layout[index].intermediate_size
        wanted = self._sizes(part, tensor, dimension, entries * width)
        if wanted and (tensor.dim() <= dimension or tensor.shape[dimension] not in wanted):
            raise SenteiError(f"{name} has shape {list(tensor.shape)}, but config.json says intermediate_size {width}.")

    def _sizes(self, part: str, tensor: torch.Tensor, dimension: int, size: int) -> set[int]:
        """How large a part of a weight may be where the weight itself has ``size``; empty where nothing is known."""
        sizes = {parts[part][dimension] for parts in self._parts(size) if len(parts.get(part, ())) > dimension}
        # A weight that is not a number for each parameter is in a format that is vLLM's own affair.
        if part in ("weight", "bias") and tensor.is_floating_point():
            sizes.add(size)
        return sizes

    def _parts(self, size: int) -> Iterator[dict[str, tuple[int, ...]]]:
        for scheme in self.schemes:
            parts = scheme.parts(size, size)
            # It says the matrix's shape in numbers, and is itself of the same shape always.
            parts.pop("weight_shape", None)
            yield parts

    def _wanted(self) -> set[str]:
        """The checkpoint's tensors that the model's parameters are made of."""
        packed: dict[str, list[str]] = self.packed_modules_mapping  # type: ignore[assignment]
        wanted: set[str] = set()
        for name, _ in self.named_parameters():
            module, _, leaf = name.rpartition(".")
            parent, _, last = module.rpartition(".")
            if leaf in (*WEIGHT_PARTS, "bias"):
                wanted |= {f"{parent}.{part}.{leaf}".lstrip(".") for part in packed.get(last, [last])}
        return wanted

    def _check_complete(self, wanted: set[str], seen: set[str]) -> None:
        if missing := sorted(wanted - seen):
            raise SenteiError(f"The checkpoint has no tensor {missing[0]} ({len(missing)} missing).")
        # Other tensors without a place vLLM refuses itself. Biases of another pipeline stage have no weight here.
        biases = (name for name in seen - wanted if name.endswith(".bias"))
        if extra := sorted(name for name in biases if name.removesuffix("bias") + "weight" in wanted):
            raise SenteiError(
                f"The checkpoint has {extra[0]}, for which the model has no place in vLLM ({len(extra)} such)."
            )
