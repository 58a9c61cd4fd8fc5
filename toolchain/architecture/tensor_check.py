"""Do the tensors of a checkpoint fit what its config says of each layer? From names and shapes alone.

Standard library only: the vLLM plugin asks this before any weight is read.
"""

from collections.abc import Mapping, Sequence

from toolchain.architecture.families import Family
from toolchain.architecture.layout import LayerLayout
from toolchain.errors import SenteiError

Shape = tuple[int, ...]


def check_layer_tensors(where: str, family: Family, layout: Sequence[LayerLayout], shapes: Mapping[str, Shape]) -> None:
    """Checks every decoder layer: parts that are kept are there, removed ones are not, and widths are as said.

    Layers of a model are alike, so a tensor that most have and one lacks is missing there, and one that few have is
    left over.

    Args:
        where: The checkpoint, for the message.
        family: Where its layers keep what.
        layout: One entry a layer.
        shapes: Of all tensors, by name.

    Raises:
        SenteiError: The first that does not fit.
    """
    layers = _by_layer(where, family, len(layout), shapes)
    for index, (tensors, wanted) in enumerate(zip(layers, layout, strict=True)):
        _check_parts(f"{where}: layer {index}", family, tensors, wanted)
        if wanted.intermediate_size:
            _check_widths(f"{where}: layer {index}", family, tensors, wanted.intermediate_size)
    attending = {index: layer.attention for index, layer in enumerate(layout)}
    with_ffn = {index: layer.intermediate_size > 0 for index, layer in enumerate(layout)}
    for parts, kept in ((family.attention_parts, attending), (family.ffn_parts, with_ffn)):
        of_part = {
            index: {name: _without_width(family, name, shape) for name, shape in tensors.items() if _is_in(name, parts)}
            for index, tensors in enumerate(layers)
            if kept[index]
        }
        _check_alike(where, of_part)


def _by_layer(where: str, family: Family, num_layers: int, shapes: Mapping[str, Shape]) -> list[dict[str, Shape]]:
    """Each layer's tensors by their name within the layer."""
    layers: list[dict[str, Shape]] = [{} for _ in range(num_layers)]
    for name, shape in shapes.items():
        if not name.startswith(f"{family.layers}."):
            continue
        number, _, tensor = name.removeprefix(f"{family.layers}.").partition(".")
        if (index := layer_index(number, num_layers)) is None:
            raise SenteiError(f"{where} holds more layers than num_hidden_layers = {num_layers} says: it has {name}.")
        layers[index][tensor] = shape
    return layers


def layer_index(number: str, num_layers: int) -> int | None:
    """The layer that a part of a tensor's name stands for; ``None`` where it stands for none.

    Only what Transformers and vLLM write themselves is a number: not ``05``, and not the digits of other scripts.
    """
    known = number.isascii() and number.isdecimal() and len(number) <= len(str(num_layers))
    return int(number) if known and str(int(number)) == number and int(number) < num_layers else None


def _check_parts(where: str, family: Family, tensors: Mapping[str, Shape], wanted: LayerLayout) -> None:
    for part, parts, kept in (
        (family.attention, family.attention_parts, wanted.attention),
        (family.ffn, family.ffn_parts, wanted.intermediate_size > 0),
    ):
        if not kept and any(_is_in(name, parts) for name in tensors):
            raise SenteiError(f"{where} has weights of the skipped {part}; config.json says otherwise.")
        for module in parts if kept else ():
            if not any(_is_in(name, (module,)) for name in tensors):
                raise SenteiError(f"{where} has no weights of {module}; config.json says otherwise.")
    for name in tensors:
        if not _is_in(name, (*family.attention_parts, *family.ffn_parts)):
            raise SenteiError(f"{where} has a tensor {name}, which is no part of a {family.model_type} layer.")


def _check_widths(where: str, family: Family, tensors: Mapping[str, Shape], width: int) -> None:
    for module in (*family.ffn_inputs, family.ffn_output):
        if f"{module}.weight" not in tensors:
            raise SenteiError(f"{where} has no tensor {module}.weight.")
    for name, shape in tensors.items():
        if (side := family.neuron_side(name)) is None:
            continue
        dimension, entries = side
        if len(shape) <= dimension or shape[dimension] != entries * width:
            raise SenteiError(
                f"{where}: {name} has shape {list(shape)}, but config.json says intermediate_size {width}."
            )


def _check_alike(where: str, layers: Mapping[int, Mapping[str, Shape]]) -> None:
    every = sorted({name for tensors in layers.values() for name in tensors})
    for name in every:
        having = {index: tensors[name] for index, tensors in layers.items() if name in tensors}
        lacking = [index for index in layers if index not in having]
        if lacking and len(having) >= len(lacking):
            raise SenteiError(f"{where}: layer {lacking[0]} has no tensor {name}.")
        if lacking:
            raise SenteiError(f"{where}: layer {min(having)} has a tensor {name}, which the others do not have.")
        first = min(having)
        for index, shape in having.items():
            if shape != having[first]:
                usual = f"{list(having[first])} in layer {first}"
                raise SenteiError(f"{where}: layer {index}: {name} has shape {list(shape)}, but {usual}.")


def _without_width(family: Family, name: str, shape: Shape) -> Shape:
    side = family.neuron_side(name)
    return shape if side is None else shape[: side[0]] + shape[side[0] + 1 :]


def _is_in(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
