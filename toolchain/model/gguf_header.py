"""Is the header of a GGUF file what its length allows? Asked before a library counts to 2**60 because the file says so.

The format: magic, version, how many tensors and how many pairs; the pairs, each a key, a type and a value; then each
tensor's name, shape, type and place (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from toolchain.errors import SenteiError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Of a number, by its type.
_FORMATS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
# Far above every model's: 262144 words, 126 layers of a dozen tensors.
_MOST_ENTRIES, _MOST_ELEMENTS, _MOST_TENSORS, _MOST_DIMENSIONS = 10_000, 2**20, 20_000, 4
# Of keys by the format; names of tensors and what settings say are shorter.
_LONGEST = 2**16 - 1


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a header says.

    Attributes:
        values: Numbers and strings by key, such as ``llama.block_count``; a string's beginning where it is long. Arrays
            are left out.
        tensor_names: Such as ``blk.0.attn_q.weight``.
        num_elements: Of all tensors together.
    """

    values: Mapping[str, str | float]
    tensor_names: frozenset[str]
    num_elements: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Walks through a header; arrays are skipped, and each value must lie within the file.

    Raises:
        SenteiError: It is no GGUF file, or its header is damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SenteiError(f"{path} is not a GGUF file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Walk(content).header()
    except (OSError, ValueError, struct.error) as error:
        raise SenteiError(f"{path} cannot be read ({error}).", "Download or copy it again.") from error


class _Walk:
    """A place in a file, moved forward; what does not fit raises ``ValueError``."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._place = content, 4

    def header(self) -> GgufHeader:
        if (version := self._number("<I")) not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {_VERSIONS}")
        num_tensors, num_entries = self._count("<Q", _MOST_TENSORS), self._count("<Q", _MOST_ENTRIES)
        values: dict[str, str | float] = {}
        for _ in range(num_entries):
            key, kind = self._string(), int(self._number("<I"))
            if kind == _ARRAY:
                self._skip_array()
            else:
                values[key] = self._string() if kind == _STRING else self._number(self._format(kind))
        tensors = [self._tensor() for _ in range(num_tensors)]
        return GgufHeader(
            values=values,
            tensor_names=frozenset(name for name, _ in tensors),
            num_elements=sum(elements for _, elements in tensors),
        )

    def _skip_array(self) -> None:
        element, count = int(self._number("<I")), self._count("<Q", _MOST_ELEMENTS)
        if element == _STRING:
            for _ in range(count):
                self._skip(int(self._number("<Q")))
        else:
            self._skip(count * struct.calcsize(self._format(element)))

    def _tensor(self) -> tuple[str, int]:
        name = self._string()
        shape = [int(self._number("<Q")) for _ in range(self._count("<I", _MOST_DIMENSIONS))]
        self._number("<I")
        offset, elements = self._number("<Q"), prod(shape)
        # The smallest types have less than two bits for an element.
        if offset > len(self._content) or elements > 8 * len(self._content):
            raise ValueError(f"a tensor of shape {shape} lies outside the file")
        return name, elements

    def _format(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise ValueError(f"{kind} is no type of a value, or of one in an array")
        return _FORMATS[kind]

    def _string(self) -> str:
        length = int(self._number("<Q"))
        self._skip(length)
        start = self._place - length
        return self._content[start : start + min(length, _LONGEST)].decode(errors="replace")

    def _count(self, form: str, most: int) -> int:
        if (count := int(self._number(form))) > most:
            raise ValueError(f"it counts {count:,} of what is {most:,} at most")
        return count

    def _number(self, form: str) -> float:
        (number,) = struct.unpack_from(form, self._content, self._place)
        self._place += struct.calcsize(form)
        return number

    def _skip(self, num_bytes: int) -> None:
        self._place += num_bytes
        if self._place > len(self._content):
            raise ValueError("it ends within its header")
