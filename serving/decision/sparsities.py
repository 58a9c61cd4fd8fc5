"""Which sparsity is tried next: small first, further while the damage is within the guard rails, then between."""

from collections.abc import Mapping, Sequence


def next_sparsity(asked: Sequence[float], held: Mapping[float, bool], *, bisections: int) -> float | None:
    """The next sparsity to try; ``None`` when there is no more.

    Damage is taken to grow with sparsity: what is beyond the first that breaks a guard rail is not tried. That one is
    then approached from the highest that holds (or from 0), each time halfway.

    Args:
        asked: Sparsities, in any order.
        held: Those that were tried, and whether their damage was shown to be within the guard rails.
        bisections: How many sparsities are tried between the two.
    """
    broken = [sparsity for sparsity, holds in held.items() if not holds]
    first_broken = min(broken, default=None)
    for sparsity in sorted(asked):
        if first_broken is not None and sparsity >= first_broken:
            break
        if sparsity not in held:
            return sparsity
    between = [sparsity for sparsity in held if sparsity not in asked]
    if first_broken is None or len(between) >= bisections:
        return None
    highest = max((sparsity for sparsity in held if sparsity < first_broken), default=0.0)
    # To the thousandth: names of plans are short, and one neuron is about as much.
    middle = round((highest + first_broken) / 2, 3)
    return middle if highest < middle < first_broken else None
