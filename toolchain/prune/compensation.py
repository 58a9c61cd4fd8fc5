"""Compensation: output projections are re-fitted in closed form, so that what is left does what the whole did.

Layer after layer, the original and the pruned model run side by side on calibration text. In each layer the projection
out of attention, then the one out of the FFN, gets the weights that bring the pruned model's residual stream closest to
the original's, with the errors of all earlier layers included: a ridge regression towards the weights it had. Last, the
norm before the head is scaled: it blows up what errors remain to the size of the original's states, which makes the
model too sure of what it says. No training, no gradients. Fitting a pruned layer's output by least squares is FLAP's
and SlimGPT's idea too (arXiv 2312.11983, 2412.18110); the target here is the residual stream. See
``docs/decisions/compensation.md``.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from toolchain.architecture.parts import Part
from toolchain.checkpoint.directory import TensorInfo
from toolchain.errors import SenteiError
from toolchain.metrics.token_metrics import PerplexityMetric, finite
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.not_finite import not_finite
from toolchain.plan.document import RefitRecord
from toolchain.prune.ridge_fit import Moments, Refit, best_fit, fit_bytes, ridge_fits, squared_errors
from toolchain.prune.stage_files import StageFiles
from toolchain.ranks.ranks import ALONE, Ranks

# One window in so many is held out: it chooses the ridges and the final norm's factor, and no weight is fitted to it.
_HELD_OUT_EVERY = 8
# A projection's inputs in all windows are kept within this share of free memory; otherwise they are computed again.
_SHARE_FOR_INPUTS = 1 / 16
_Kept = TypeVar("_Kept")


@dataclass(frozen=True, kw_only=True)
class Compensated:
    """What compensation did.

    Attributes:
        tensors: Where the re-fitted weights are, by name in the checkpoint; in the dtype the checkpoint keeps.
        records: One a re-fitted projection, for the plan.
        final_norm_factor: By which the norm before the head was multiplied; 1 if nothing was changed.
        perplexity: Of the compensated model on the first window.
        held_out_perplexity_original: Of the original, on the windows that no projection was fitted to.
        held_out_perplexity_before: Of the pruned model as it came, on the same windows.
        held_out_perplexity_after: Of the compensated model on the same windows.
    """

    tensors: dict[str, TensorInfo]
    records: list[RefitRecord]
    final_norm_factor: float
    perplexity: float
    held_out_perplexity_original: float
    held_out_perplexity_before: float
    held_out_perplexity_after: float

    @property
    def made_worse(self) -> bool:
        """Whether windows that no projection was fitted to are predicted worse than before: too few tokens."""
        return self.held_out_perplexity_after > self.held_out_perplexity_before


@torch.inference_mode()
def compensate(
    walk: LayerWalk,
    kept_neurons: Sequence[NDArray[np.int64]],
    removed_attention: Collection[int],
    windows: torch.Tensor,
    files: StageFiles | None,
    *,
    dtypes: Mapping[str, torch.dtype],
    ranks: Ranks = ALONE,
    on_layer: Callable[[], None] = lambda: None,
) -> Compensated:
    """Prunes a model layer by layer and re-fits its output projections: one model in memory, each layer visited once.

    Args:
        walk: Over the unpruned model. Its layers are not to be used afterwards.
        kept_neurons: int64 ``[intermediate_size]`` per layer, ascending.
        removed_attention: Layers.
        windows: Calibration, int64 ``[num_samples, seq_len]``, at least two; one in eight is held out.
        files: Gets the weights, a file per layer, and what the next layer begins with. What was begun there with the
            same arguments is gone on with. Of several ranks the first has them, the others ``None``.
        dtypes: Stored dtype of every weight, by name in the checkpoint: the fit goes on with the rounded weights.
        ranks: Who shares the windows and the fits; all of them come to the same weights.
        on_layer: Called after each layer, for progress.

    Raises:
        SenteiError: A single window, or NaN or Inf among the activations.
    """
    if len(windows) < 2:
        raise SenteiError("Compensation needs at least 2 calibration windows.", "Raise --samples.")
    pruning = _Pruning(kept_neurons, frozenset(removed_attention), _residual_factor(walk), dtypes)
    share = _Share(ranks, len(windows))
    states = _begun(files, walk, share) or _States.entering(walk, windows, share)
    for _ in range(states.next_layer):
        on_layer()
    for index in range(states.next_layer, len(walk.layers)):
        refitted = _refit_layer(walk, pruning, index, states, share)
        if refitted and files is not None:
            states.tensors |= files.save_tensors(f"layer-{index}", refitted)
        states.next_layer = index + 1
        states.save(files, share)
        on_layer()
    return _finished(walk, pruning, states, windows, share, files)


def _finished(
    walk: LayerWalk,
    pruning: "_Pruning",
    states: "_States",
    windows: torch.Tensor,
    share: "_Share",
    files: StageFiles | None,
) -> Compensated:
    """Scales the norm before the head, and measures what came out of it all."""

    def of_held_out(own: torch.Tensor) -> float:
        metric, rows = PerplexityMetric(windows[share.own_held_out]), torch.empty(0, windows.shape[1] - 1)
        losses = share.together(metric.of_tokens(walk, own) if len(own) else rows, share.held_out)
        return finite(metric.combine(losses), "perplexity", walk)

    original, before = of_held_out(states.before[share.is_held_out]), of_held_out(states.plain)
    norm_factor, tensors = _final_norm_factor(walk, states.before, states.after, share), dict(states.tensors)
    if norm_factor != 1:
        scaled = _scale_final_norm(walk, pruning.dtypes, norm_factor)
        if files is not None:
            tensors |= files.save_tensors("final-norm", scaled)
    # The first window is the first rank's.
    perplexity = PerplexityMetric(windows[:1])(walk, states.after[:1]) if share.ranks.is_first else 0.0
    return Compensated(
        tensors=tensors,
        records=states.records,
        final_norm_factor=norm_factor,
        perplexity=finite(share.ranks.from_first(perplexity)[0], "perplexity", walk),
        held_out_perplexity_original=original,
        held_out_perplexity_before=before,
        held_out_perplexity_after=of_held_out(states.after[share.is_held_out]),
    )


@dataclass(frozen=True)
class _Share:
    """This rank's windows: each rank takes turns, so that all have as many of those that are held out.

    Attributes:
        ranks: Who shares them.
        num_windows: How many there are in all.
    """

    ranks: Ranks
    num_windows: int

    @property
    def own(self) -> list[int]:
        """The numbers of this rank's windows; none if there are more ranks."""
        return list(range(self.ranks.rank, self.num_windows, self.ranks.size))

    @property
    def is_held_out(self) -> list[bool]:
        """For each of them, whether no weight is fitted to it."""
        return [_is_held_out(number, self.num_windows) for number in self.own]

    @property
    def held_out(self) -> list[int]:
        """The numbers of all windows that are held out, of whichever rank."""
        return [number for number in range(self.num_windows) if _is_held_out(number, self.num_windows)]

    @property
    def own_held_out(self) -> list[int]:
        """The numbers of this rank's."""
        return [number for number in self.held_out if number % self.ranks.size == self.ranks.rank]

    def together(self, rows: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """The rows that all ranks have of windows with these numbers, in order.

        Args:
            rows: Of this rank's windows among them, one each.
            numbers: Of all of them, ascending.
        """
        if not self.ranks.several:
            return rows
        places = [[place for place, number in enumerate(numbers) if number % self.ranks.size == rank]
                  for rank in range(self.ranks.size)]  # fmt: skip
        padded = rows.new_zeros(max(map(len, places)), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = torch.empty(len(numbers), *rows.shape[1:], dtype=rows.dtype)
        for where, part in zip(places, self.ranks.gather(padded), strict=True):
            found[where] = part[: len(where)]
        return found


@dataclass(frozen=True)
class _Pruning:
    """What is done to each layer.

    Attributes:
        kept_neurons: int64 ``[intermediate_size]`` per layer, ascending.
        removed_attention: Layers.
        factor: See :func:`_residual_factor`.
        dtypes: Stored dtype of every weight, by name in the checkpoint.
    """

    kept_neurons: Sequence[NDArray[np.int64]]
    removed_attention: frozenset[int]
    factor: float
    dtypes: Mapping[str, torch.dtype]


@dataclass(kw_only=True)
class _States:
    """Where compensation is: what enters the next layer in this rank's windows, and what was found below it.

    Attributes:
        before: In the original, ``[num_samples, seq_len, hidden_size]``.
        after: In the pruned model as it is re-fitted, the same.
        plain: In the pruned model as it came; held-out windows alone.
        next_layer: The layer.
        records: See :class:`Compensated`.
        tensors: See :class:`Compensated`.
    """

    before: torch.Tensor
    after: torch.Tensor
    plain: torch.Tensor
    next_layer: int = 0
    records: list[RefitRecord] = field(default_factory=list)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @classmethod
    def entering(cls, walk: LayerWalk, windows: torch.Tensor, share: _Share) -> "_States":
        """What enters the first layer, which is the same in all three."""
        # A rank without a window has nothing of the right shape.
        before = walk.embed(windows[share.own]) if share.own else walk.embed(windows[:1])[:0]
        return cls(before=before, after=before.clone(), plain=before[share.is_held_out])

    def follow(self, device: torch.device) -> None:
        """Goes to the device of the next layer: of a model on several GPUs each may be on another."""
        self.before, self.after, self.plain = (each.to(device) for each in (self.before, self.after, self.plain))

    def save(self, files: StageFiles | None, share: _Share) -> None:
        """Leaves all of it on disk, of all ranks."""
        numbers = range(share.num_windows)
        states = {
            "before": share.together(self.before, numbers),
            "after": share.together(self.after, numbers),
            "plain": share.together(self.plain, share.held_out),
        }
        found = {"next_layer": self.next_layer, "records": [each.model_dump(mode="json") for each in self.records]}
        if files is not None:
            files.save("states", states, found)


def _begun(files: StageFiles | None, walk: LayerWalk, share: _Share) -> _States | None:
    """Where an earlier run was, by however many ranks; ``None`` if it had not finished a layer."""
    tensors, said = (files.load("states") if files is not None else None) or ({}, None)
    said, tensors = share.ranks.from_first(said, tensors)
    if said is None:
        return None
    # Arguments that the layers take belong to a length of windows, and are found out on the way.
    walk.embed(torch.zeros(1, tensors["before"].shape[1], dtype=torch.int64))
    weights: dict[str, TensorInfo] = {}
    for index in range(said["next_layer"] if files is not None else 0):
        assert files is not None
        weights |= files.saved_tensors(f"layer-{index}")
    own = {
        "before": share.own,
        "after": share.own,
        "plain": [share.held_out.index(each) for each in share.own_held_out],
    }
    return _States(
        **{name: tensors[name][rows].to(walk.model.device) for name, rows in own.items()},
        next_layer=said["next_layer"],
        records=[RefitRecord.model_validate(each) for each in said["records"]],
        tensors=weights,
    )


def _refit_layer(
    walk: LayerWalk, pruning: _Pruning, index: int, states: _States, share: _Share
) -> dict[str, torch.Tensor]:
    """Runs one layer of the original, prunes it, and re-fits the output projections that it has left.

    Args:
        walk: The model.
        pruning: What is taken out, and how weights are stored.
        index: The layer.
        states: What enters it; afterwards, what leaves it. Gets a record for each re-fitted projection.
        share: This rank's part.

    Returns:
        The re-fitted weights by name in the checkpoint.
    """
    family = walk.family
    # Each projection, and the half of the layer that is left out while it is looked at.
    parts: tuple[tuple[str, Part], ...] = ((family.attention_output, "ffn"), (family.ffn_output, "attention"))
    refitted: dict[str, torch.Tensor] = {}
    # Fits take much longer than reading a layer, and the memory of another.
    with walk.layers.layer(index, read_ahead=False) as module:
        states.follow(walk.device_of(module))
        targets = _run_original(walk, module, index, states.before, pruning.factor)
        walk.layers.cut(index, pruning.kept_neurons[index], attention=index not in pruning.removed_attention)
        if len(states.plain):
            states.plain = walk.run(module, index, states.plain)
        for name, other in parts:
            projection = _projection(module, name)
            if projection is None:
                continue
            run = partial(_run_part, walk, module, index, name=name, without=other)
            full_name = f"{family.layers}.{index}.{name}.weight"
            inputs = _room_for_inputs(walk, projection, states.after)
            fitting = _Fitting(projection, run, targets[name], pruning.factor, pruning.dtypes[full_name], inputs)
            found = _fit(walk, index, fitting, states.after, share)
            if found.weight is not None:
                refitted[full_name] = found.weight
                projection.weight = nn.Parameter(found.weight.to(projection.weight), requires_grad=False)
                states.records.append(_record(index, name, found))
            for number in range(len(states.after)):
                row = states.after[number : number + 1]
                if inputs is None:
                    states.after[number] = walk.run_without([other], module, index, row)[0]
                else:
                    states.after[number] = (row + pruning.factor * projection(inputs.pop(number)))[0]
    return refitted


def _room_for_inputs(walk: LayerWalk, projection: nn.Linear, states: torch.Tensor) -> dict[int, torch.Tensor] | None:
    """Where inputs of a projection are kept by window; ``None`` if they take too much memory, or say too little.

    What follows from them is what the layer itself says, to the bit, unless a norm stands behind the projection.
    """
    num_inputs = projection.in_features
    size = states[..., 0].numel() * num_inputs * states.element_size()
    # Moments and fits are about to take their part.
    fit = fit_bytes(num_inputs, projection.out_features, walk.model.dtype.itemsize)
    free = walk.free_bytes() - fit
    return {} if size <= _SHARE_FOR_INPUTS * free and not walk.family.norms_outputs else None


@dataclass(frozen=True)
class _Fitting:
    """What is fitted.

    Attributes:
        projection: Of the pruned layer.
        run: Runs the part of the layer that ends with it, on one window.
        target: What it should say.
        factor: Of the residual stream.
        dtype: The weight is stored in.
        inputs: Gets what enters it, by window; ``None`` if that is not kept.
    """

    projection: nn.Linear
    run: Callable[[torch.Tensor], "_Seen"]
    target: "_Target"
    factor: float
    dtype: torch.dtype
    inputs: dict[int, torch.Tensor] | None

    def moments(self, states: torch.Tensor, share: _Share) -> Moments:
        """Sums over the windows of all ranks that are not held out.

        Args:
            states: What enters the part of the layer, in this rank's windows.
            share: This rank's part.
        """
        projection = self.projection
        found = Moments(projection.in_features, projection.out_features, projection.weight.device)
        self._look_at(states, share, found.add, held_out=False)
        for each in (found.gram, found.cross, found.energy):
            share.ranks.add(each)
        return found

    def errors(self, weights: Sequence[torch.Tensor], states: torch.Tensor, share: _Share) -> list[float]:
        """What weights leave of what is wanted in all ranks' held-out windows; see :func:`squared_errors`."""
        rows: list[torch.Tensor] = []
        self._look_at(states, share, lambda *window: rows.append(squared_errors(weights, *window)), held_out=True)
        own = torch.stack(rows) if rows else torch.empty(0, len(weights) + 1, dtype=torch.float64)
        errors = [0.0] * (len(weights) + 1)
        # In the order of the windows, whoever has them.
        for row in share.together(own, share.held_out).tolist():
            errors = [sum_ + each for sum_, each in zip(errors, row, strict=True)]
        return errors

    def _look_at(
        self,
        states: torch.Tensor,
        share: _Share,
        look: Callable[[torch.Tensor, torch.Tensor], None],
        *,
        held_out: bool,
    ) -> None:
        """Shows what enters the projection, and what its weight is to make of it, in each of this rank's windows."""
        bias = 0.0 if self.projection.bias is None else self.projection.bias
        for number, is_held_out in enumerate(share.is_held_out):
            if is_held_out == held_out:
                seen = self.run(states[number : number + 1])
                if self.inputs is not None:
                    self.inputs[number] = seen.inputs
                look(seen.inputs, self.target.of(number, seen, self.factor) - bias)
                # Before the next window runs.
                del seen


def _fit(walk: LayerWalk, index: int, fitting: _Fitting, states: torch.Tensor, share: _Share) -> Refit:
    """Fits a projection to the windows that are not held out, and lets the others choose.

    Args:
        walk: The model.
        index: The layer.
        fitting: The projection.
        states: What enters the part of the layer that ends with it, in this rank's windows.
        share: This rank's part.
    """
    weight = fitting.projection.weight

    def check(energy: float) -> None:
        if not math.isfinite(energy):
            raise not_finite(f"Layer {index}: activations hold NaN or Inf", walk.model, walk.model.dtype)

    moments = fitting.moments(states, share)
    check(float(moments.energy))
    fits = ridge_fits(weight, moments, fitting.dtype, share.ranks)
    # By far the largest matrix there is; held-out windows can do without.
    del moments
    errors = fitting.errors([weight, *fits.values()], states, share)
    check(errors[-1])
    return best_fit(fits, errors)


def _record(layer: int, projection: str, result: Refit) -> RefitRecord:
    """A re-fitted projection for the plan."""
    return RefitRecord(
        layer=layer,
        projection=projection,
        ridge=result.ridge,
        error_before=result.error_before,
        error_after=result.error_after,
    )


def _scale_final_norm(
    walk: LayerWalk, dtypes: Mapping[str, torch.dtype], norm_factor: float
) -> dict[str, torch.Tensor]:
    """Multiplies what the norm before the head gives out; returns its weight as it is stored."""
    family, final_norm = walk.family, walk.final_norm
    name = f"{family.final_norm}.weight"
    old, offset = final_norm.get_parameter("weight"), family.norm_offset
    scaled = (norm_factor * (old.double() + offset) - offset).to(dtypes[name])
    final_norm.weight = nn.Parameter(scaled.to(old), requires_grad=False)
    return {name: scaled}


def held_out_windows(windows: torch.Tensor) -> torch.Tensor:
    """The windows that no weight is fitted to, of int64 ``[num_samples, seq_len]``."""
    return windows[[_is_held_out(number, len(windows)) for number in range(len(windows))]]


def _is_held_out(number: int, num_windows: int) -> bool:
    """One of each eight windows, at another place in each: texts of a mixture take turns, and each is to be asked."""
    turn, place = divmod(number, _HELD_OUT_EVERY)
    return place == (min(_HELD_OUT_EVERY, num_windows) - 1 - turn) % _HELD_OUT_EVERY


def _final_norm_factor(walk: LayerWalk, before: torch.Tensor, after: torch.Tensor, share: _Share) -> float:
    """The factor that brings the normed last states closest to the original's: least squares over held-out windows.

    ``before`` and ``after`` are what left the last layers, ``[num_samples, seq_len, hidden_size]``, in this rank's
    windows. Windows that the weights were fitted to would say that there is less to correct than there is.
    """
    own = torch.zeros(len(share.own_held_out), 2, dtype=torch.float64)
    pairs = zip(own, before[share.is_held_out], after[share.is_held_out], strict=True)
    for row, one, other in pairs:
        wanted, says = walk.final_norm(one).double(), walk.final_norm(other).double()
        row[0], row[1] = (says * wanted).sum(), says.square().sum()
    product = energy = 0.0
    for of_window, of_says in share.together(own, share.held_out).tolist():
        product, energy = product + of_window, energy + of_says
    # States that have nothing in common with the original's are beyond a factor.
    return product / energy if product > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Of one window: input and output of a projection, and the residual stream behind it."""

    inputs: torch.Tensor
    says: torch.Tensor
    state: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What the original has to say at a projection, in all windows, ``[num_samples, seq_len, hidden_size]``.

    Attributes:
        state: The residual stream behind it.
        says: What the projection itself says; only where a norm stands between it and the residual stream.
    """

    state: torch.Tensor
    says: torch.Tensor | None

    def of(self, number: int, seen: _Seen, factor: float) -> torch.Tensor:
        """What the pruned model's projection should say in window ``number``."""
        if self.says is not None:
            return self.says[number]
        # It is to say also what the residual stream lacks by now.
        return seen.says + (self.state[number : number + 1] - seen.state) / factor


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
    walk: LayerWalk, module: nn.Module, index: int, states: torch.Tensor, factor: float
) -> dict[str, _Target]:
    """Runs one layer of the original on all windows; ``states`` then holds what leaves it.

    Returns:
        What the pruned layer's projections are to say, by name.
    """
    attention, ffn = walk.family.attention_output, walk.family.ffn_output
    says = {name: torch.empty_like(states) for name in (attention, ffn)} if walk.family.norms_outputs else {}
    behind_attention = torch.empty_like(states)
    for number in range(len(states)):
        row = states[number : number + 1]
        with _observed(module, (attention, ffn), lambda _inputs, output: output) as outputs:
            left = walk.run(module, index, row)
        [said] = outputs[attention]
        behind_attention[number] = row[0] + factor * said[0]
        states[number] = left[0]
        for name, kept in says.items():
            kept[number] = outputs[name][0][0]
    return {
        attention: _Target(state=behind_attention, says=says.get(attention)),
        ffn: _Target(state=states, says=says.get(ffn)),
    }


def _run_part(
    walk: LayerWalk, module: nn.Module, index: int, hidden: torch.Tensor, *, name: str, without: Part
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
