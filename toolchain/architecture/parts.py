"""The two halves of a decoder block, each of which can be removed whole. Standard library only."""

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

Part = Literal["attention", "ffn"]
PARTS: tuple[Part, ...] = ("attention", "ffn")


class SubBlock(NamedTuple):
    """The attention or the FFN of a layer, with the norms that go with it."""

    layer: int
    part: Part

    def __str__(self) -> str:
        """As a plan's candidates are called."""
        return f"{self.part} {self.layer}"


def whole_blocks(layers: Iterable[int]) -> frozenset[SubBlock]:
    """Attention and FFN of each of these layers."""
    return frozenset(SubBlock(layer, part) for layer in layers for part in PARTS)


def layers_of(part: Part, sub_blocks: Collection[SubBlock]) -> list[int]:
    """The layers whose attention, or whose FFN, is among ``sub_blocks``; ascending."""
    return sorted(each.layer for each in sub_blocks if each.part == part)
