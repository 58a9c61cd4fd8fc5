"""How much each FFN neuron matters (2SSP stage 1, arXiv 2501.17771, section 3.1)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from toolchain.model.layer_walk import LayerWalk
from toolchain.model.not_finite import not_finite
from toolchain.prune.window_sums import UNSHARED, Shared, sum_of_parts


@torch.inference_mode()
def neuron_importance(
    walk: LayerWalk,
    windows: torch.Tensor,
    *,
    shared: Shared = UNSHARED,
    on_window: Callable[[], None] = lambda: None,
) -> tuple[NDArray[np.float32], ...]:
    """Scores every neuron by the size of its activation.

    The score of neuron *j* is the L2 norm, over the tokens of one window, of column *j* of the input of the FFN's
    output projection, averaged over the windows. Statistics are streamed: no activation is stored. Norms are taken in
    float32 and summed in float64.

    Args:
        walk: Over the unpruned model.
        windows: int64 ``[num_samples, seq_len]``.
        shared: How the windows are divided, and where the sums are kept.
        on_window: Called once a window, for progress.

    Returns:
        float32 ``[intermediate_size]`` a layer; higher is kept.

    Raises:
        SenteiError: NaN or Inf among the activations; names the first such layer.
    """
    calls = walk.calls(windows)

    def norms_by_call(own: range) -> torch.Tensor:
        by_layer = _norms(walk, torch.cat([calls[number] for number in own]))
        return torch.cat(by_layer, dim=1)

    def on_calls(done: range) -> None:
        for _ in range(sum(len(calls[number]) for number in done)):
            on_window()

    at_once = shared.ranks.smallest(_calls_at_once(walk, calls))
    total = sum_of_parts(len(calls), norms_by_call, shared, at_once=at_once, on_parts=on_calls)
    means = (total / len(windows)).float().numpy()
    # The layers of a model that is not pruned are equally wide.
    return tuple(np.split(means, len(walk.layers)))


def _calls_at_once(walk: LayerWalk, calls: Sequence[torch.Tensor]) -> int:
    """One where a layer costs nothing to visit again; as many as memory holds where it is read."""
    if walk.layers.resident:
        return 1
    fitting = max(1, walk.num_fitting(calls[0].shape[1]) // len(calls[0]))
    return min(fitting, len(calls))


def _norms(walk: LayerWalk, windows: torch.Tensor) -> list[torch.Tensor]:
    """Sums over the windows of each call, float64 ``[number of calls, intermediate_size]`` a layer."""
    hidden, norms = walk.embed(windows), []
    for index in range(len(walk.layers)):
        with (
            walk.layers.layer(index) as module,
            _inputs_of(module.get_submodule(walk.family.ffn_output)) as observed,
        ):
            hidden = walk.run(module, index, hidden)
            # Of layers on different GPUs, in one place.
            norms.append(torch.stack(observed).cpu())
            if not bool(torch.isfinite(norms[-1]).all()):
                raise not_finite(f"Layer {index}: FFN activations hold NaN or Inf", walk.model, walk.model.dtype)
    return norms


def norms_of(activations: torch.Tensor) -> torch.Tensor:
    """L2 norms over tokens, taken in float32, summed over windows: ``[windows, seq, width]`` to float64 ``[width]``."""
    # Not vector_norm: over any dimension but the last it is ten times slower on a CPU.
    return activations.float().square().sum(1).sqrt().double().sum(0)


@contextmanager
def _inputs_of(projection: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects, for every call of ``projection``, the norms over tokens of its input, summed over sequences."""
    observed: list[torch.Tensor] = []

    def observe(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        observed.append(norms_of(inputs[0]))

    handle = projection.register_forward_pre_hook(observe)
    try:
        yield observed
    finally:
        handle.remove()
