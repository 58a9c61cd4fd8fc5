"""Is the header of a GGUF file what its length allows? Asked before a library counts to 2**60 because the file says so.

The format: magic, version, how many tensors and how many pairs; the pairs, each a key, a type and a value; then each
tensor's name, shape, type and place (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from toolchain.errors import SenteiError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Bytes of a value, by its type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Far above every model's: 262144 words, 126 layers of a dozen tensors.
_MOST_ENTRIES, _MOST_ELEMENTS, _MOST_TENSORS, _MOST_DIMENSIONS = 10_000, 2**20, 20_000, 4


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a header says.

    Attributes:
        num_elements: Of all tensors together.
    """

    num_elements: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Walks through a header; values are skipped, and each must lie within the file.

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
        self._content, self._place, self._num_strings = content, 4, 0

    def header(self) -> GgufHeader:
        if (version := self._number("<I")) not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {_VERSIONS}")
        num_tensors, num_entries = self._count("<Q", _MOST_TENSORS), self._count("<Q", _MOST_ENTRIES)
        for _ in range(num_entries):
            self._string()
            self._value(self._number("<I"))
        return GgufHeader(num_elements=sum(self._tensor() for _ in range(num_tensors)))

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            element, count = self._number("<I"), self._count("<Q", _MOST_ELEMENTS)
            if element == _STRING:
                for _ in range(count):
                    self._string()
            else:
                self._skip(count * self._size(element))
        else:
            self._skip(self._size(kind))

    def _tensor(self) -> int:
        self._string()
        shape = [self._number("<Q") for _ in range(self._count("<I", _MOST_DIMENSIONS))]
        self._number("<I")
        offset, elements = self._number("<Q"), prod(shape)
        # The smallest types have less than two bits for an element.
        if offset > len(self._content) or elements > 8 * len(self._content):
            raise ValueError(f"a tensor of shape {shape} lies outside the file")
        return elements

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"{kind} is no type of a value, or of one in an array")
        return _SIZES[kind]

    def _string(self) -> None:
        self._skip(self._number("<Q"))

    def _count(self, form: str, most: int) -> int:
        if (count := self._number(form)) > most:
            raise ValueError(f"it counts {count:,} of what is {most:,} at most")
        return count

    def _number(self, form: str) -> int:
        (number,) = struct.unpack_from(form, self._content, self._place)
        self._place += struct.calcsize(form)
        return int(number)

    def _skip(self, num_bytes: int) -> None:
        self._place += num_bytes
        if self._place > len(self._content):
            raise ValueError("it ends within its header")
