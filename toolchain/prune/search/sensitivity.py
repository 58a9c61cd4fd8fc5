"""How much the loss would change with each FFN neuron's removal: estimates by gradients.

Activations alone say which neurons of a layer matter, and not which layers do: what an early layer gets wrong passes
through all later ones. Gradients see that. Nothing is trained.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from toolchain.model.layer_walk import LayerWalk
from toolchain.model.not_finite import not_finite
from toolchain.prune.search.importance import norms_of
from toolchain.prune.window_sums import UNSHARED, Shared, sum_of_parts

# Logits of so many tokens, with their gradients, exist at a time.
_HEAD_TOKENS = 256
# What enters the layers takes so much of free memory where windows go up and down together.
_SHARE_FOR_STATES = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Two estimates a neuron, comparable across layers, and its importance; float32 ``[intermediate_size]`` a layer.

    With ``a_tj`` the activation of neuron *j* for token *t*, and ``L`` the summed loss of a window:

    Attributes:
        slope: ``|sum_t a_tj dL/da_tj|``, averaged over the windows, in nats: what its removal does to the loss
            (first-order Taylor expansion: Molchanov et al., arXiv 1611.06440, section 2.2, with sums over tokens and a
            window as the example). Tells layers apart well, and the neurons of a layer badly.
        fisher: ``sum_t (a_tj dL/da_tj)^2``, averaged over the windows, in nats squared: Fisher information about a
            factor on the neuron (as in Fisher pruning: Theis et al., arXiv 1801.05787, with a token as the example).
        importance: As :func:`toolchain.prune.search.importance.neuron_importance` has it of these windows, on the way.
    """

    slope: tuple[NDArray[np.float32], ...]
    fisher: tuple[NDArray[np.float32], ...]
    importance: tuple[NDArray[np.float32], ...]

    def weigh(self, importance: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], ...]:
        """Scores of neurons that look at the loss too: ``importance * fisher ** (1 / 4)``, for each layer alone."""
        return tuple(scores * fisher**0.25 for scores, fisher in zip(importance, self.fisher, strict=True))


def neuron_sensitivity(
    walk: LayerWalk,
    windows: torch.Tensor,
    *,
    shared: Shared = UNSHARED,
    on_window: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Estimates what the removal of every neuron does to the loss.

    The walk goes up layer by layer and down again; one window's states and one layer's graph are in memory at a time.
    Where layers are read from disk, as many windows go together as memory holds.

    Args:
        walk: Over the unpruned model.
        windows: int64 ``[num_samples, seq_len]``.
        shared: How the windows are divided, and where the sums are kept.
        on_window: Called once a window, for progress.

    Raises:
        SenteiError: NaN or Inf among the gradients; names the highest such layer.
    """
    # A walk of its own: what others have remembered under inference mode takes no gradients.
    walk = LayerWalk(walk.model, walk.family, walk.layers, num_sharing=walk.num_sharing)

    def on_windows(done: range) -> None:
        for _ in done:
            on_window()

    total = sum_of_parts(
        len(windows),
        lambda own: _of_windows(walk, windows[own.start : own.stop]),
        shared,
        at_once=shared.ranks.smallest(_windows_at_once(walk, windows)),
        on_parts=on_windows,
    )
    means = (total / len(windows)).float().numpy()
    # The layers of a model that is not pruned are equally wide.
    slope, fisher, importance = (tuple(np.split(each, len(walk.layers))) for each in np.split(means, 3))
    return Sensitivity(slope=slope, fisher=fisher, importance=importance)


def _windows_at_once(walk: LayerWalk, windows: torch.Tensor) -> int:
    """One where a layer costs nothing to visit again; where it is read, as many as a part of the free memory holds."""
    if walk.layers.resident:
        return 1
    states = (len(walk.layers) + 1) * windows.shape[1] * walk.model.config.hidden_size * walk.model.dtype.itemsize
    fitting = int(_SHARE_FOR_STATES * walk.free_bytes() / states)
    return min(max(1, fitting), len(windows))


def _of_windows(walk: LayerWalk, windows: torch.Tensor) -> torch.Tensor:
    """Slopes, Fisher information and norms of the neurons of all layers, one after another: float64, a row a window.

    Each window goes through a layer by itself, so that its row is the same beside whichever others.
    """
    states = _entering_states(walk, windows)
    ends = zip(states.pop(), windows.split(1), strict=True)
    gradients = [_gradient_of_loss(walk, last, window) for last, window in ends]
    found: list[list[_Sums]] = [[] for _ in gradients]
    for index in reversed(range(len(walk.layers))):
        with walk.layers.layer(index) as module:
            for number, entering in enumerate(states.pop()):
                gradients[number], sums = _of_layer(walk, module, index, entering, gradients[number])
                found[number].append(sums)
    return torch.stack([torch.cat([sum_ for kind in zip(*reversed(rows), strict=True) for sum_ in kind])
                        for rows in found])  # fmt: skip


_Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _of_layer(
    walk: LayerWalk, module: nn.Module, index: int, entering: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, _Sums]:
    """The gradient below a layer, and slope, Fisher information and norm of its neurons, in one window."""
    with torch.enable_grad(), _input_of(module.get_submodule(walk.family.ffn_output)) as seen:
        entering.requires_grad_()
        leaving = walk.run(module, index, entering)
        [activations] = seen
        below, by_neuron = torch.autograd.grad(leaving, (entering, activations), gradient)
    contributions = (activations.detach().float() * by_neuron.float()).flatten(0, -2)
    squared = contributions.square().sum(0).double()
    if not bool(torch.isfinite(squared).all()):
        raise not_finite(f"Layer {index}: gradients hold NaN or Inf", walk.model, walk.model.dtype)
    slope = contributions.sum(0).abs().double()
    return below, (slope.cpu(), squared.cpu(), norms_of(activations.detach()).cpu())


@torch.no_grad()
def _entering_states(walk: LayerWalk, windows: torch.Tensor) -> list[list[torch.Tensor]]:
    """What enters each layer, and what leaves the last, in each window."""
    states = [[walk.embed(window) for window in windows.split(1)]]
    for index in range(len(walk.layers)):
        with walk.layers.layer(index) as module:
            states.append([walk.run(module, index, entering) for entering in states[-1]])
    return states


@torch.enable_grad()
def _gradient_of_loss(walk: LayerWalk, last: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Of a window's summed loss, with respect to what leaves the last layer."""
    gradient = torch.zeros_like(last)
    tokens, targets = last[0, :-1], window[0, 1:].to(last.device)
    for start in range(0, len(tokens), _HEAD_TOKENS):
        part = tokens[start : start + _HEAD_TOKENS].detach().requires_grad_()
        loss = walk.losses(part, targets[start : start + _HEAD_TOKENS]).sum()
        [gradient[0, start : start + len(part)]] = torch.autograd.grad(loss, part)
    return gradient


@contextmanager
def _input_of(projection: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what enters ``projection``."""
    seen: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
