"""FFN widths that differ from layer to layer, by sensitivity."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

# No layer is narrowed below this share of the width that an even split would leave it.
_FLOOR = 0.5


def ranked_widths(
    sensitivity: Sequence[NDArray[np.float32]], even: Sequence[int], align: int, protected: Collection[int] = ()
) -> tuple[int, ...]:
    """Widths by one ranking of the neurons of all layers, as many neurons in all as ``even`` keeps.

    Whole units of ``align`` neurons are ranked by their mean, and no layer falls below half of its even width. Which
    neurons a layer then keeps is not decided here.

    Args:
        sensitivity: float32 ``[intermediate_size]`` a layer, comparable across layers
            (:func:`toolchain.prune.search.sensitivity.neuron_sensitivity`).
        even: Widths of an even split, multiples of ``align`` but for those of full width.
        align: Neurons of a unit.
        protected: Layers that keep their even width.
    """
    free = [layer for layer in range(len(even)) if layer not in protected]
    gains: list[tuple[float, int]] = []
    widths = list(even)
    for layer in free:
        scores = np.sort(sensitivity[layer].astype(np.float64))[::-1]
        units = len(scores) // align
        floor = max(1, int(even[layer] * _FLOOR) // align)
        widths[layer] = floor * align
        means = scores[: units * align].reshape(units, align).mean(1)
        gains += [(-float(gain), layer) for gain in means[floor:]]
    # Within a layer gains fall from unit to unit, so no unit is taken before a better one of its layer.
    budget = (sum(even) - sum(widths)) // align
    for _, layer in sorted(gains, key=lambda gain: gain[0])[:budget]:
        widths[layer] += align
    return tuple(widths)
