"""Sums over calibration windows: divided among ranks, kept on the way, and the same to the byte however it was done.

What each part of the windows says is added in their order, in float64, by every rank: who computed it, and in how many
runs, leaves no trace. A part is what goes through the model in one call: a window, or a few that are short.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from toolchain.ranks.ranks import ALONE, Ranks


def _forget(tensors: Mapping[str, torch.Tensor], said: Mapping[str, Any]) -> None:
    """Keeps nothing."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """How a sum is divided, and where it is kept; by default in one process that keeps nothing.

    Attributes:
        ranks: Who computes it.
        save: Told by rank 0 of named tensors and JSON, after each round.
        saved: What was kept, the same in all ranks and by however many of them; ``None`` to begin.
    """

    ranks: Ranks = ALONE
    save: Callable[[Mapping[str, torch.Tensor], Mapping[str, Any]], None] = _forget
    saved: tuple[Mapping[str, torch.Tensor], Mapping[str, Any]] | None = None


UNSHARED = Shared()


def sum_of_parts(
    num_parts: int,
    of_parts: Callable[[range], torch.Tensor],
    shared: Shared,
    *,
    at_once: int = 1,
    on_parts: Callable[[range], None] = lambda parts: None,
) -> torch.Tensor:
    """Sums what parts say, round by round.

    Args:
        num_parts: How many parts there are.
        of_parts: Computes some that follow each other: ``[number of them, size]``, of one size for all.
        shared: Who computes, and where the sums are kept.
        at_once: How many parts a rank computes in a round.
        on_parts: Told of those that are done, for progress; of those that were kept too.

    Returns:
        float64 ``[size]`` on the CPU, in all ranks.
    """
    ranks, done, total = shared.ranks, 0, None
    if shared.saved is not None:
        tensors, said = shared.saved
        done, total = int(said["done"]), tensors["sums"]
    on_parts(range(done))
    for start, counts in _rounds(done, num_parts, ranks.size, at_once):
        first = start + sum(counts[: ranks.rank])
        own = range(first, first + counts[ranks.rank])
        for rows in ranks.gather_rows(of_parts(own) if own else None, counts):
            for row in rows:
                total = row if total is None else total + row
        assert total is not None
        if ranks.is_first:
            shared.save({"sums": total}, {"done": start + sum(counts)})
        on_parts(range(start, start + sum(counts)))
    assert total is not None
    return total


def _rounds(done: int, num_parts: int, num_ranks: int, at_once: int) -> Iterator[tuple[int, list[int]]]:
    """Where each round starts, and how many parts each rank has in it; the lower ranks have no fewer."""
    while done < num_parts:
        some = min(num_ranks * at_once, num_parts - done)
        counts = [some // num_ranks + (rank < some % num_ranks) for rank in range(num_ranks)]
        yield done, counts
        done += some
