"""Compensation: output projections are re-fitted in closed form, so that what is left does what the whole did.

Layer after layer, the original and the pruned model run side by side on calibration text. In each layer the projection
out of attention, then the one out of the FFN, gets the weights that bring the pruned model's residual stream closest to
the original's, with the errors of all earlier layers included: a ridge regression towards the weights it had. Last, the
norm before the head is scaled: it blows up what errors remain to the size of the original's states, which makes the
model too sure of what it says. No training, no gradients. Fitting a pruned layer's output by least squares is FLAP's
and SlimGPT's idea too (arXiv 2312.11983, 2412.18110); the target here is the residual stream. See
``docs/decisions/compensation.md``.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from toolchain.architecture.families import Family
from toolchain.architecture.parts import Part
from toolchain.checkpoint.directory import TensorInfo
from toolchain.errors import SenteiError
from toolchain.metrics.token_metrics import PerplexityMetric, finite
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.not_finite import not_finite
from toolchain.plan.document import RefitRecord

# Ridges that are tried, relative to each input's own energy; held-out windows choose.
RIDGES = (0.1, 1.0, 10.0)
# One window in so many is held out: it chooses the ridges and the final norm's factor, and no weight is fitted to it.
_HELD_OUT_EVERY = 8
# Errors below this share are rounding, not damage.
_ROUNDING = 1e-6

_Kept = TypeVar("_Kept")


@dataclass(frozen=True, kw_only=True)
class Compensated:
    """What compensation did.

    Attributes:
        tensors: Where the re-fitted weights are, by name in the checkpoint; in the dtype the checkpoint keeps.
        records: One a re-fitted projection, for the plan.
        final_norm_factor: By which the norm before the head was multiplied; 1 if nothing was changed.
        perplexity: Of the compensated model on the first window.
        held_out_perplexity_before: Of the pruned model as it came, on the windows that no weight was fitted to.
        held_out_perplexity_after: Of the compensated model on the same windows.
    """

    tensors: dict[str, TensorInfo]
    records: list[RefitRecord]
    final_norm_factor: float
    perplexity: float
    held_out_perplexity_before: float
    held_out_perplexity_after: float

    @property
    def made_worse(self) -> bool:
        """Whether text that no weight was fitted to is predicted worse than before: too few tokens were fitted to."""
        return self.held_out_perplexity_after > self.held_out_perplexity_before


@torch.inference_mode()
def compensate(
    original: LayerWalk,
    pruned: LayerWalk,
    windows: torch.Tensor,
    directory: Path,
    *,
    dtypes: dict[str, torch.dtype],
    on_layer: Callable[[], None] = lambda: None,
) -> Compensated:
    """Re-fits the output projections of a pruned model, one layer in memory at a time.

    Args:
        original: The unpruned model.
        pruned: The same with its FFNs narrowed and attentions removed; resident layers are changed in place.
        windows: Calibration, int64 ``[num_samples, seq_len]``, at least two; one in eight is held out.
        directory: An existing directory for the weights, one file a layer.
        dtypes: Stored dtype of every weight, by name in the checkpoint: the fit goes on with the rounded weights.
        on_layer: Called after each layer, for progress.

    Raises:
        SenteiError: A single window, or NaN or Inf among the activations.
    """
    if len(windows) < 2:
        raise SenteiError("Compensation needs at least 2 calibration windows.", "Raise --samples.")
    pair = _Pair(original=original, pruned=pruned, factor=_residual_factor(original), dtypes=dtypes)
    tensors: dict[str, TensorInfo] = {}
    records: list[RefitRecord] = []
    held_out = torch.tensor([_is_held_out(number, len(windows)) for number in range(len(windows))])
    before, after = original.embed(windows), pruned.embed(windows)
    states = _States(before=before, after=after, plain=after[held_out])
    del before, after
    for index in range(len(original.layers)):
        if refitted := _refit_layer(pair, index, states, records):
            tensors |= _saved(refitted, directory / f"layer-{index}.safetensors")
        on_layer()
    perplexity_of_held_out = PerplexityMetric(windows[held_out])
    perplexity_before = finite(perplexity_of_held_out(pruned, states.plain), "perplexity", pruned)
    norm_factor = _final_norm_factor(original, pruned, states.before, states.after)
    if norm_factor != 1:
        tensors |= _saved(_scale_final_norm(pair, norm_factor), directory / "final-norm.safetensors")
    perplexity = PerplexityMetric(windows[:1])(pruned, states.after[:1])
    return Compensated(
        tensors=tensors,
        records=records,
        final_norm_factor=norm_factor,
        perplexity=finite(perplexity, "perplexity", pruned),
        held_out_perplexity_before=perplexity_before,
        held_out_perplexity_after=finite(perplexity_of_held_out(pruned, states.after[held_out]), "perplexity", pruned),
    )


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The two models that run side by side.

    Attributes:
        original: The unpruned model.
        pruned: The same with its FFNs narrowed and attentions removed.
        factor: See :func:`_residual_factor`.
        dtypes: Stored dtype of every weight, by name in the checkpoint.
    """

    original: LayerWalk
    pruned: LayerWalk
    factor: float
    dtypes: Mapping[str, torch.dtype]


@dataclass(kw_only=True)
class _States:
    """What enters the next layer, ``[num_samples, seq_len, hidden_size]`` each.

    Attributes:
        before: In the original.
        after: In the pruned model as it is re-fitted.
        plain: In the pruned model as it came; held-out windows alone.
    """

    before: torch.Tensor
    after: torch.Tensor
    plain: torch.Tensor


def _refit_layer(pair: _Pair, index: int, states: _States, records: list[RefitRecord]) -> dict[str, torch.Tensor]:
    """Runs both models through one layer and re-fits the output projections that the pruned one has left.

    Args:
        pair: Both models.
        index: The layer.
        states: What enters it; afterwards, what leaves it.
        records: Gets one for each re-fitted projection.

    Returns:
        The re-fitted weights by name in the checkpoint.
    """
    original, pruned, family = pair.original, pair.pruned, pair.original.family
    # Each projection, and the half of the layer that is left out while it is looked at.
    parts: tuple[tuple[str, Part], ...] = ((family.attention_output, "ffn"), (family.ffn_output, "attention"))
    with original.layers.layer(index) as module:
        says, behind = _run_original(original, module, index, states.before, pair.factor)
    refitted: dict[str, torch.Tensor] = {}
    with pruned.layers.layer(index) as module:
        states.plain = pruned.run(module, index, states.plain)
        for name, other in parts:
            projection = _projection(module, name)
            if projection is None:
                continue
            seen = [_run_part(pruned, module, index, row, name, without=other) for row in states.after.split(1)]
            wanted = _wanted(says[name], behind[name], seen, pair.factor, family)
            moments = _moments(projection, seen, wanted)
            if not all(bool(torch.isfinite(each.energy)) for each in moments):
                raise not_finite(f"Layer {index}: activations hold NaN or Inf", pruned.model, pruned.model.dtype)
            full_name = f"{family.layers}.{index}.{name}.weight"
            result = refit(projection.weight, *moments, pair.dtypes[full_name])
            if result.weight is not None:
                refitted[full_name] = result.weight
                projection.weight = nn.Parameter(result.weight.to(projection.weight), requires_grad=False)
                records.append(_record(index, name, result))
            if family.norms_outputs:
                left = [pruned.run_without([other], module, index, row) for row in states.after.split(1)]
            else:
                # What running it again would say.
                left = [each.state + pair.factor * (projection(each.inputs) - each.says) for each in seen]
            states.after = torch.cat(left)
            del seen, wanted, moments, left
    states.before = behind[family.ffn_output]
    return refitted


def _record(layer: int, projection: str, result: "Refit") -> RefitRecord:
    """A re-fitted projection for the plan."""
    return RefitRecord(
        layer=layer,
        projection=projection,
        ridge=result.ridge,
        error_before=result.error_before,
        error_after=result.error_after,
    )


def _scale_final_norm(pair: _Pair, norm_factor: float) -> dict[str, torch.Tensor]:
    """Multiplies what the pruned model's norm before the head gives out; returns its weight as it is stored."""
    family, final_norm = pair.original.family, pair.pruned.final_norm
    name = f"{family.final_norm}.weight"
    old, offset = final_norm.get_parameter("weight"), family.norm_offset
    scaled = (norm_factor * (old.double() + offset) - offset).to(pair.dtypes[name])
    final_norm.weight = nn.Parameter(scaled.to(old), requires_grad=False)
    return {name: scaled}


def _saved(weights: dict[str, torch.Tensor], file: Path) -> dict[str, TensorInfo]:
    """Writes weights into a file, and says that they are there."""
    save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, file)
    return {name: TensorInfo(file, tuple(weight.shape), weight.dtype) for name, weight in weights.items()}


def _is_held_out(number: int, num_windows: int) -> bool:
    """One of each eight windows, at another place in each: texts of a mixture take turns, and each is to be asked."""
    turn, place = divmod(number, _HELD_OUT_EVERY)
    return place == (min(_HELD_OUT_EVERY, num_windows) - 1 - turn) % _HELD_OUT_EVERY


def _final_norm_factor(original: LayerWalk, pruned: LayerWalk, before: torch.Tensor, after: torch.Tensor) -> float:
    """The factor that brings the normed last states closest to the original's: least squares over held-out windows.

    ``before`` and ``after`` are what left the last layers, ``[num_samples, seq_len, hidden_size]``. Windows that the
    weights were fitted to would say that there is less to correct than there is.
    """
    product = energy = 0.0
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        if _is_held_out(number, len(before)):
            wanted, says = original.final_norm(one).double(), pruned.final_norm(other).double()
            product, energy = product + float((says * wanted).sum()), energy + float(says.square().sum())
    # States that have nothing in common with the original's are beyond a factor.
    return product / energy if product > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Of one window: input and output of a projection, and the residual stream behind it."""

    inputs: torch.Tensor
    says: torch.Tensor
    state: torch.Tensor


def _wanted(
    original_says: torch.Tensor, original_state: torch.Tensor, seen: Sequence[_Seen], factor: float, family: Family
) -> Iterator[torch.Tensor]:
    """What a projection should say, window by window."""
    if family.norms_outputs:
        yield from original_says.split(1)
        return
    for state, each in zip(original_state.split(1), seen, strict=True):
        # It is to say also what the residual stream lacks by now.
        yield each.says + (state - each.state) / factor


def _moments(
    projection: nn.Linear, seen: Sequence[_Seen], wanted: Iterator[torch.Tensor]
) -> tuple["Moments", "Moments"]:
    """Moments of a projection's inputs and of what it should say, over the windows that fit and over those held out."""
    fitted, held_out = (
        Moments(projection.in_features, projection.out_features, projection.weight.device) for _ in range(2)
    )
    for number, (each, target) in enumerate(zip(seen, wanted, strict=True)):
        bias = 0.0 if projection.bias is None else projection.bias
        (held_out if _is_held_out(number, len(seen)) else fitted).add(each.inputs, target - bias)
    return fitted, held_out


class Moments:
    """What a least-squares fit needs of its data: sums over tokens, in float64."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_inputs, num_outputs, dtype=torch.float64, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """``inputs`` ``[..., num_inputs]`` and ``targets`` ``[..., num_outputs]``, one row a token."""
        x, y = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        with _bfloat16_products(inputs.dtype == targets.dtype == torch.bfloat16):
            self.gram += x.T @ x
            self.cross += x.T @ y
        self.energy += y.double().square().sum()

    def error(self, weight: torch.Tensor) -> float:
        """``sum |W x - y|^2 / sum |y|^2``; ``weight`` is ``[num_outputs, num_inputs]``."""
        columns = weight.double().T
        residual = (columns * (self.gram @ columns)).sum() - 2 * (columns * self.cross).sum() + self.energy
        return float(residual / self.energy.clamp_min(torch.finfo(torch.float64).tiny))

    def ridge_fit(self, weight: torch.Tensor, ridge: float) -> torch.Tensor:
        """Minimises ``sum |W x - y|^2 + sum_j strength_j |W_j - weight_j|^2``.

        ``strength_j`` is the ridge times ``sum x_j^2``, so that an input's unit does not matter, and the few inputs of
        huge activations do not hold the others back.

        Returns:
            float64 ``[num_outputs, num_inputs]``.
        """
        energies = self.gram.diagonal()
        # An input that is always zero would make the matrix singular.
        strengths = ridge * energies.clamp_min(_ROUNDING * energies.mean())
        raised = self.gram.clone()
        raised.diagonal().add_(strengths)
        factor = torch.linalg.cholesky(raised)
        del raised
        return torch.cholesky_solve(self.cross + strengths[:, None] * weight.double().T, factor).T


@dataclass(frozen=True, kw_only=True)
class Refit:
    """The weight that won, ``None`` if nothing beat the old one; held-out errors as shares of the target's energy."""

    weight: torch.Tensor | None
    ridge: float
    error_before: float
    error_after: float


def refit(weight: torch.Tensor, fitted: Moments, held_out: Moments, dtype: torch.dtype) -> Refit:
    """Ridge regression towards ``weight``; held-out tokens choose the ridge.

    Args:
        weight: ``[num_outputs, num_inputs]``, as it is.
        fitted: Moments of the tokens that fit.
        held_out: Moments of those that choose.
        dtype: The result is rounded to this before it is judged.
    """
    before = held_out.error(weight)
    trials = {ridge: fitted.ridge_fit(weight, ridge).to(dtype) for ridge in RIDGES}
    errors = {ridge: held_out.error(trial) for ridge, trial in trials.items()}
    best = min(errors, key=errors.__getitem__)
    if before < _ROUNDING or not errors[best] < before:
        return Refit(weight=None, ridge=0.0, error_before=before, error_after=before)
    return Refit(weight=trials[best], ridge=best, error_before=before, error_after=errors[best])


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


@contextmanager
def _observed(
    module: nn.Module, names: Collection[str], keep: Callable[[torch.Tensor, torch.Tensor], _Kept]
) -> Iterator[dict[str, list[_Kept]]]:
    """Collects what ``keep`` makes of input and output, at each call of a layer's projections."""
    calls: dict[str, list[_Kept]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, inputs, output: calls[name].append(keep(inputs[0], output))

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _run_original(
    walk: LayerWalk, module: nn.Module, index: int, hidden: torch.Tensor, factor: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One layer of the original: what its projections say, and the residual stream behind each of them."""
    names = (walk.family.attention_output, walk.family.ffn_output)
    # Of all windows: inputs, which are several times as wide, would take the most memory of all.
    with _observed(module, names, lambda _inputs, output: output) as outputs:
        left = torch.cat([walk.run(module, index, row) for row in hidden.split(1)])
    says = {name: torch.cat(outputs.pop(name)) for name in names}
    return says, {names[0]: hidden + factor * says[names[0]], names[1]: left}


def _run_part(
    walk: LayerWalk, module: nn.Module, index: int, hidden: torch.Tensor, name: str, *, without: Part
) -> _Seen:
    """Runs a layer's attention or its FFN alone, on one window: the one that ends with the projection ``name``."""
    with _observed(module, [name], lambda inputs, output: (inputs, output)) as calls:
        left = walk.run_without([without], module, index, hidden)
    [(inputs, says)] = calls[name]
    return _Seen(inputs=inputs, says=says, state=left)


def _projection(module: nn.Module, name: str) -> nn.Linear | None:
    """A layer's output projection; ``None`` if its part was removed, or is as narrow as nothing."""
    try:
        projection = module.get_submodule(name)
    except AttributeError:
        return None
    assert isinstance(projection, nn.Linear)
    return projection if projection.in_features else None


def _residual_factor(walk: LayerWalk) -> float:
    """What attention and FFN are multiplied by before they are added to the residual stream."""
    key = walk.family.residual_factor
    return float(getattr(walk.model.config, key)) if key else 1.0
