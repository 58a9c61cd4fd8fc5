"""Memory of a KV cache on a CPU: a row takes what its tokens need, page by page, and gives it back when it leaves."""

import math
import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ITEM_BYTES = 4


class KvPages:
    """A float32 array of zeros, of which the system holds only the pages that were written.

    Attributes:
        array: float32, of the shape asked for.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        """Reserves addresses, and no memory.

        Args:
            shape: ``[rows, ...]``, nothing of it 0.

        Raises:
            MemoryError: There are no addresses left.
        """
        self._row_bytes = math.prod(shape[1:]) * _ITEM_BYTES
        self._pages: mmap.mmap | None = None
        if not hasattr(mmap, "MADV_DONTNEED"):  # on Windows
            self.array: NDArray[np.float32] = np.zeros(shape, np.float32)
            return
        try:
            # Private: shared pages would be those of a file, which are not given back before the file is gone.
            self._pages = mmap.mmap(-1, shape[0] * self._row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(str(error)) from error
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            # NumPy asks for pages of 2 MiB. A head's first token would take memory for thousands.
            self._pages.madvise(mmap.MADV_NOHUGEPAGE)
        self.array = np.frombuffer(self._pages, np.float32).reshape(shape)

    def give_back(self, row: int) -> None:
        """Gives the pages of one row back to the system; the row reads as zeros where pages were all its own."""
        if self._pages is None:
            return
        start = -(-row * self._row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (row + 1) * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._pages.madvise(mmap.MADV_DONTNEED, start, end - start)
