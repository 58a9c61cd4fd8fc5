"""Which models are measured: few layers of one model's shape, each unlike the others in one thing.

What an attention costs is the difference between a model with and one without attentions; what a narrower FFN saves,
the difference between two widths; what belongs to no layer, what is left of the difference between two depths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint

Layout = tuple[LayerLayout, ...]
# Between these shares of the full width an FFN's cost is taken to be linear; no plan goes below the narrowest.
_WIDTHS = (1 / 4, 1 / 2, 3 / 4, 1)
# Models that no cost is fitted to: widths halfway between those above, and how many of four layers keep attention.
_HELD_OUT = (((7 / 8, 5 / 8), 4), ((5 / 8,), 3), ((3 / 8, 7 / 8, 5 / 8), 2))
# What matrix units multiply fastest; widths of real models are multiples of it.
_TILE = 64
# So many layers that a processor's cache does not hold them: each is read from memory, as in the whole model.
_LEAST_LAYERS, _LEAST_BYTES = 8, 128 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model to measure: its layers, and whether costs are fitted to it or checked by it."""

    layout: Layout
    role: Literal["fitted", "held_out"]


def num_layers_measured(checkpoint: Checkpoint) -> int:
    """Layers of each model that is measured; the whole model's, where it is small."""
    whole = len(checkpoint.layout)
    bytes_a_layer = checkpoint.num_block_parameters * checkpoint.dtype.itemsize // whole
    return min(whole, max(_LEAST_LAYERS, -(-_LEAST_BYTES // bytes_a_layer)))


def widths_measured(full: int) -> tuple[int, ...]:
    """The FFN widths whose cost is measured, ascending to the full one."""
    return tuple(sorted({_width(full, share) for share in _WIDTHS}))


def shapes_to_measure(full: int, num_layers: int) -> dict[str, Shape]:
    """The models by name; all but the last few are fitted, and tell every cost apart.

    Args:
        full: The unpruned model's FFN width.
        num_layers: Layers of each model but one; at least two.
    """
    widths = widths_measured(full)
    whole = _layers(num_layers, [full])
    fitted = {
        "whole": whole,
        "half-as-deep": whole[: num_layers // 2],
        # One stays: a server has to keep a cache of something.
        "one-attention": _layers(num_layers, [full], attentions=range(1)),
        **{f"ffn-{width}": _layers(num_layers, [width]) for width in widths[:-1]},
    }
    held_out = {
        f"held-out-{number}": _layers(
            num_layers,
            [_width(full, share) for share in shares],
            attentions=[layer for layer in range(num_layers) if layer % 4 < attending],
        )
        for number, (shares, attending) in enumerate(_HELD_OUT, 1)
    }
    return {
        **{name: Shape(layout=layout, role="fitted") for name, layout in fitted.items()},
        **{name: Shape(layout=layout, role="held_out") for name, layout in held_out.items()},
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
