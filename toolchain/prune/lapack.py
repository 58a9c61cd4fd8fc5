"""LAPACK's Cholesky factorisation and solution, in place, while other threads of Python go on.

SciPy's own wrappers hold the interpreter's lock as long as a call takes, minutes at the widths of large models on one
core. The thread by which several ranks tell each other that they live would be silent meanwhile, and the others would
give this rank up. Called through ``ctypes``, the same functions of the same library let it run.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from scipy.linalg import cython_lapack


def factor_in_place(matrix: torch.Tensor) -> None:
    """Overwrites what stands on and above the diagonal with ``U``, where ``matrix = U^T U`` (``dpotrf``).

    Args:
        matrix: float64 ``[size, size]`` on the CPU, contiguous, symmetric; what stands below the diagonal stays.

    Raises:
        torch.linalg.LinAlgError: It is not positive definite.
    """
    # LAPACK counts by columns: of a matrix that is contiguous by rows, its lower triangle is the upper one.
    failed = _call("dpotrf", b"L", len(matrix), matrix, len(matrix))
    if failed:
        raise torch.linalg.LinAlgError("The matrix of a fit is not positive definite.")


def solve_in_place(factored: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiplies each row of ``right`` by the inverse of a matrix that :func:`factor_in_place` has factored.

    Args:
        factored: float64 ``[size, size]``.
        right: float64 ``[rows, size]``, contiguous; overwritten (``dpotrs``).

    Returns:
        ``right``.
    """
    _call("dpotrs", b"L", len(factored), len(right), factored, len(factored), right, len(factored))
    return right


def _call(name: str, *arguments: bytes | int | torch.Tensor) -> int:
    """Calls a function of LAPACK, all of whose arguments are pointers, and returns its ``info``."""
    held = [_pointed_at(each) for each in arguments]
    info = ctypes.c_int(0)
    _function(name, len(held) + 1)(*held, ctypes.byref(info))
    return info.value


def _pointed_at(argument: bytes | int | torch.Tensor) -> object:
    if isinstance(argument, torch.Tensor):
        assert argument.dtype is torch.float64 and argument.is_contiguous() and not argument.is_cuda
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.byref(ctypes.c_int(argument))


@cache
def _function(name: str, num_arguments: int) -> Callable[..., None]:
    """The address that SciPy gives out for compiled code; a ``CFUNCTYPE`` lets the interpreter's lock go."""
    capsule, api = ctypes.py_object(cython_lapack.__pyx_capi__[name]), ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetPointer.restype = ctypes.c_char_p, ctypes.c_void_p
    signature = api.PyCapsule_GetName(capsule)
    address = api.PyCapsule_GetPointer(capsule, ctypes.c_char_p(signature))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * num_arguments)(address)
