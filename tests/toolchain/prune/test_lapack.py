"""Cholesky factorisation and solution in place, while other threads go on."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolchain.prune.lapack import factor_in_place, solve_in_place


def positive_definite(size: int, seed: int = 0) -> torch.Tensor:
    inputs = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return inputs.T @ inputs + torch.eye(size)


@given(size=st.integers(1, 70), rows=st.integers(1, 9), seed=st.integers(0, 1000))
def test_it_solves_as_numpy_does_and_leaves_the_lower_half(size: int, rows: int, seed: int):
    matrix = positive_definite(size, seed)
    right = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factored, solution = matrix.clone(), right.clone()
    factor_in_place(factored)
    assert solve_in_place(factored, solution) is solution
    np.testing.assert_allclose(solution, np.linalg.solve(matrix.numpy(), right.numpy().T).T, rtol=1e-8, atol=1e-10)
    assert torch.equal(factored.tril(-1), matrix.tril(-1))


def test_what_is_not_positive_definite_is_said():
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        factor_in_place(-positive_definite(3))


def test_another_thread_goes_on():
    """A rank of several says that it lives while it computes, or the others end the job."""
    matrix, done, ticks = positive_definite(2500), threading.Event(), 0

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.001)
            ticks += 1

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        time.sleep(0.05)
        before = ticks
        factor_in_place(matrix)
        assert ticks > before + 3
    finally:
        done.set()
        ticking.join()
