"""``sentei``, the program: what must be right while everything else is still being imported."""

import importlib
import mmap
import os
import resource
import sys
import traceback
from contextlib import suppress

from toolchain.errors import INTERRUPTED, ITSELF_FAILED

# Twice what NumPy and SciPy take up with their libraries, in a process with one thread.
_BLAS_BYTES = 512 * 1024 * 1024
# Products of small matrices take no memory.
_LARGE_ENOUGH = 128


def main() -> None:
    """Runs :func:`toolchain.cli.app.main`. Ctrl-C is one word here too."""
    try:
        _load_blas_in_limited_memory()
        from toolchain.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(INTERRUPTED)
    except Exception:
        # Python would end with 1, which says that a check failed.
        traceback.print_exc()
        sys.exit(ITSELF_FAILED)
    run()


def _load_blas_in_limited_memory() -> None:
    """Loads OpenBLAS under ``ulimit -v``, and has it take its memory, while there is room for it.

    Later there may be none, and then OpenBLAS asks for memory for ever: in the code by which the system loads it, and
    in its first product or factor, which takes 32 MB that it keeps. NumPy and SciPy have one OpenBLAS each.
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    try:
        mmap.mmap(-1, _BLAS_BYTES).close()
    except OSError:
        sys.stderr.write("Error: Memory ran out. Raise the limit on address space (ulimit -v).\n")
        sys.exit(2)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each thread takes tens of megabytes at once
    with suppress(ImportError):
        lapack = importlib.import_module("scipy.linalg.lapack")
        matrix = importlib.import_module("numpy").eye(_LARGE_ENOUGH)
        lapack.dpotrf(matrix @ matrix)
