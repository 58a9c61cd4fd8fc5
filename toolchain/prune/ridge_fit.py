"""Ridge regression of one projection: the closed-form fits of :mod:`toolchain.prune.compensation`, in little memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from toolchain.prune.lapack import factor_in_place, solve_in_place
from toolchain.ranks.ranks import ALONE, Ranks

# Ridges that are tried, relative to each input's own energy; held-out windows choose.
RIDGES = (0.1, 1.0, 10.0)
# Errors below this share are rounding, not damage.
_ROUNDING = 1e-6
# So many rows of a matrix of moments, or of a weight, are worked on at a time.
_ROWS = 256


def fit_bytes(num_inputs: int, num_outputs: int, weight_itemsize: int) -> int:
    """What a fit takes at least: the moments, in float64, and of each ridge the weight that came out."""
    return 8 * num_inputs * (num_inputs + num_outputs) + len(RIDGES) * num_inputs * num_outputs * weight_itemsize


class Moments:
    """What a least-squares fit needs of its data: sums over tokens, in float64.

    Attributes:
        gram: Of the inputs, ``[num_inputs, num_inputs]``; above the diagonal it is only right after :meth:`complete`.
        cross: Of targets and inputs, ``[num_outputs, num_inputs]``.
        energy: Of the targets.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_outputs, num_inputs, dtype=torch.float64, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """``inputs`` ``[..., num_inputs]`` and ``targets`` ``[..., num_outputs]``, one row per token."""
        x, y = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        with _bfloat16_products(inputs.dtype == targets.dtype == torch.bfloat16):
            # The other half is the same.
            for start, stop in self._blocks():
                self.gram[start:stop, :stop] += x[:, start:stop].T @ x[:, :stop]
            for start in range(0, len(self.cross), _ROWS):
                self.cross[start : start + _ROWS] += y[:, start : start + _ROWS].T @ x
        self.energy += y.double().square().sum()

    def complete(self) -> None:
        """Fills in what stands above the diagonal."""
        for start, stop in self._blocks():
            block = self.gram[start:stop, start:stop]
            block.copy_(block.tril() + block.tril(-1).T)
            self.gram[start:stop, stop:] = self.gram[stop:, start:stop].T

    def ridge_fit(self, weight: torch.Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Minimises ``sum |W x - y|^2 + sum_j strength_j |W_j - weight_j|^2``. Of complete moments.

        ``strength_j`` is the ridge times ``sum x_j^2``, so that an input's unit does not matter, and the few inputs of
        huge activations do not hold the others back.

        Returns:
            ``[num_outputs, num_inputs]`` in ``dtype``; computed in float64.
        """
        energies = self.gram.diagonal().clone()
        # An input that is always zero would make the matrix singular.
        strengths = ridge * energies.clamp_min(_ROUNDING * energies.mean())
        found = torch.empty(self.cross.shape, dtype=dtype, device=self.gram.device)
        with self._factored(strengths) as factor:
            # By rows: what is solved for is several times as large as the weight.
            for part, old, cross in zip(found.split(_ROWS), weight.split(_ROWS), self.cross.split(_ROWS), strict=True):
                part.copy_(_solved(factor, old.to(torch.float64, copy=True).mul_(strengths).add_(cross)))
        return found

    @contextmanager
    def _factored(self, strengths: torch.Tensor) -> Iterator[torch.Tensor]:
        """Lends the Cholesky factor of the matrix with ``strengths`` added to its diagonal, below the diagonal.

        It takes the matrix' place meanwhile: the two of them would be more than anything else that is in memory.
        """
        on_host = self.gram.cpu() if self.gram.is_cuda else None
        energies = self.gram.diagonal().clone()
        self.gram.diagonal().add_(strengths)
        try:
            if on_host is not None:
                # LAPACK and torch count by columns: of a matrix that is the same both ways.
                torch.linalg.cholesky(self.gram.mT, out=self.gram.mT)
                yield self.gram.mT
                return
            factor_in_place(self.gram)
            yield self.gram.mT
        finally:
            if on_host is not None:
                self.gram.copy_(on_host)
            else:
                # Only what stands above the diagonal was overwritten.
                self.gram.diagonal().copy_(energies)
                self.complete()

    def _blocks(self) -> Iterator[tuple[int, int]]:
        size = len(self.gram)
        return ((start, min(start + _ROWS, size)) for start in range(0, size, _ROWS))


@dataclass(frozen=True, kw_only=True)
class Refit:
    """The weight that won, ``None`` if nothing beat the old one; held-out errors as shares of the target's energy."""

    weight: torch.Tensor | None
    ridge: float
    error_before: float
    error_after: float


def _solved(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``right``, float64 ``[rows, size]``, times the inverse of the matrix with this Cholesky factor."""
    if factor.is_cuda:
        halfway = torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False)
        return torch.linalg.solve_triangular(factor, halfway, upper=False, left=False)
    return solve_in_place(factor.mT, right)


def ridge_fits(
    weight: torch.Tensor, moments: Moments, dtype: torch.dtype, ranks: Ranks = ALONE
) -> dict[float, torch.Tensor]:
    """Ridge regressions towards ``weight``, ``[num_outputs, num_inputs]``, by ridge; rounded to ``dtype``.

    Of several ranks, each fits with ridges of its own, and hands out what it found.
    """
    moments.complete()
    owners = {ridge: place % ranks.size for place, ridge in enumerate(RIDGES)}
    own = {ridge: moments.ridge_fit(weight, ridge, dtype) for ridge, owner in owners.items() if owner == ranks.rank}
    fits = {}
    for ridge, owner in owners.items():
        fits[ridge] = own[ridge] if ridge in own else torch.empty(weight.shape, dtype=dtype, device=weight.device)
        ranks.broadcast(fits[ridge], owner)
    return fits


def squared_errors(weights: Sequence[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What each weight leaves of some tokens' targets: ``sum |W x - y|^2``, and at the end what there was, ``|y|^2``.

    Args:
        weights: ``[num_outputs, num_inputs]`` each.
        inputs: ``[..., num_inputs]``, a row per token.
        targets: ``[..., num_outputs]``.

    Returns:
        float64 ``[len(weights) + 1]`` on the CPU. Products are summed in float32; beside bfloat16 inputs weights are
        rounded to bfloat16, as the model will have them.
    """
    x, y = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
    errors = torch.zeros(len(weights) + 1, dtype=torch.float64, device=x.device)
    with _bfloat16_products(inputs.dtype == targets.dtype == torch.bfloat16):
        for place, weight in enumerate(weights):
            for rows, wanted in zip(weight.split(_ROWS), y.split(_ROWS, dim=1), strict=True):
                errors[place] += (x @ rows.float().T).sub_(wanted).double().square().sum()
    errors[-1] = y.double().square().sum()
    return errors.cpu()


def best_fit(fits: Mapping[float, torch.Tensor], errors: Sequence[float]) -> Refit:
    """The weight that says best what held-out tokens ask for, if it is not the one there was.

    Args:
        fits: See :func:`ridge_fits`.
        errors: Of the weight there was, then of the fits: :func:`squared_errors`, summed over windows.
    """
    *left, energy = errors
    before, *by_ridge = (each / max(energy, torch.finfo(torch.float64).tiny) for each in left)
    # A weight that overflowed when it was rounded says NaN.
    best, ridge = min(zip(by_ridge, fits, strict=True), key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    if before < _ROUNDING or not best < before:
        return Refit(weight=None, ridge=0.0, error_before=before, error_after=before)
    return Refit(weight=fits[ridge], ridge=ridge, error_before=before, error_after=best)


@contextmanager
def _bfloat16_products(exact: bool) -> Iterator[None]:
    """Lets float32 matrix products round their inputs to bfloat16, in which hardware multiplies several times faster.

    Nothing is lost where the inputs are bfloat16 numbers: products are summed in float32 all the same.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if exact else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
