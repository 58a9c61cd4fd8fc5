"""Which models are measured: few layers of one model's shape, which differ in depth, attentions and FFN widths.

What an attention costs is the difference between a model with and one without attentions; what a narrower FFN saves,
the difference between two widths; what belongs to no layer, what is left of the difference between two depths. Several
things differ at once in some of the models, so that each cost is in several differences, and any one model can be
predicted from the others.
"""

from collections.abc import Sequence

from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint

Layout = tuple[LayerLayout, ...]
# Between these shares of the full width an FFN's cost is taken to be linear; no plan goes below the narrowest.
_WIDTHS = (1 / 4, 1 / 2, 1)
# Halfway between known widths on average, to see whether it is linear.
_BETWEEN = (3 / 8, 5 / 8)
# What matrix units multiply fastest; widths of real models are multiples of it.
_TILE = 64
# So many layers that a processor's cache does not hold them: each is read from memory, as in the whole model.
_LEAST_LAYERS, _LEAST_BYTES = 8, 128 * 1024 * 1024


def num_layers_measured(checkpoint: Checkpoint) -> int:
    """Layers of each model that is measured; the whole model's, where it is small."""
    whole = len(checkpoint.layout)
    bytes_a_layer = checkpoint.num_block_parameters * checkpoint.dtype.itemsize // whole
    return min(whole, max(_LEAST_LAYERS, -(-_LEAST_BYTES // bytes_a_layer)))


def widths_measured(full: int) -> tuple[int, ...]:
    """The FFN widths whose cost is measured, ascending to the full one."""
    return tuple(sorted({_width(full, share) for share in _WIDTHS}))


def shapes_to_measure(full: int, num_layers: int) -> dict[str, Layout]:
    """The models by name: seven, for the five costs that :func:`widths_measured` makes.

    Args:
        full: The unpruned model's FFN width.
        num_layers: Layers of the deep ones; at least two.
    """
    narrow, middle, _ = widths_measured(full)
    between = [_width(full, share) for share in _BETWEEN]
    half = num_layers // 2
    return {
        "whole": _layers(num_layers, [full]),
        "half-as-deep": _layers(half, [full]),
        # One attention stays: a server has to keep a cache of something.
        "one-attention": _layers(num_layers, [full], attentions=range(1)),
        f"ffn-{middle}": _layers(num_layers, [middle]),
        f"ffn-{narrow}": _layers(num_layers, [narrow]),
        "small": _layers(half, [narrow], attentions=range(1)),
        "mixed": _layers(num_layers, between, attentions=range(0, num_layers, 2)),
    }


def _layers(num_layers: int, widths: Sequence[int], attentions: Sequence[int] | None = None) -> Layout:
    """Layers whose widths take turns."""
    return tuple(
        LayerLayout(attention=attentions is None or layer in attentions, intermediate_size=widths[layer % len(widths)])
        for layer in range(num_layers)
    )


def _width(full: int, share: float) -> int:
    tile = _TILE if full >= _TILE / min(_WIDTHS) else 1
    return full if share == 1 else max(1, round(full * share / tile)) * tile
