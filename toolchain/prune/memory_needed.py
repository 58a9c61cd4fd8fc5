"""How much memory a run of ``sentei prune`` takes, from shapes alone: said before anything is loaded.

What is counted is what cannot be avoided, so that no run is refused that would have fitted; the rest is a few hundred
megabytes of Python and its libraries. See ``docs/decisions/memory.md``.
"""

from dataclasses import dataclass

import torch

from toolchain.checkpoint.directory import Checkpoint
from toolchain.errors import SenteiError
from toolchain.memory import available_bytes
from toolchain.prune.ridge_fit import fit_bytes
from toolchain.prune.settings import PruneSettings


@dataclass(frozen=True, kw_only=True)
class MemoryNeeded:
    """Bytes at the peak of each part of a run.

    Attributes:
        search: The weights, and what gradients add to them where widths are ranked. With ``--offload`` the weights are
            those of embeddings, head and two layers: one runs, and one waits, no wider than it is stored.
        fit: The weights, the hidden states of all windows and the moments of the widest projection; 0 without
            compensation. With ``--offload`` one layer.
    """

    search: int
    fit: int

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.search, self.fit)


def memory_needed(checkpoint: Checkpoint, settings: PruneSettings, *, offload: bool) -> MemoryNeeded:
    """Counts bytes; ``offload`` in place of the settings' own."""
    hidden, layers = int(checkpoint.config["hidden_size"]), len(checkpoint.layout)
    width = max(layer.intermediate_size for layer in checkpoint.layout)
    layer = checkpoint.num_block_parameters // layers
    outside = checkpoint.num_parameters - checkpoint.num_block_parameters
    size = settings.dtype.itemsize
    state = settings.seq_len * hidden * size
    # A layer's graph: residual stream, norms, queries to outputs, and three activations of the FFN, each about twice.
    graph = settings.seq_len * (12 * hidden + 6 * width) * size
    ranked, compensates = settings.widths == "ranked", settings.compensate
    moments = fit_bytes(width, hidden, checkpoint.dtype.itemsize)
    of_fit = (outside + layer if offload else checkpoint.num_parameters) * size
    of_search = of_fit + (layer * min(size, checkpoint.dtype.itemsize) if offload else 0)
    return MemoryNeeded(
        search=of_search + ((layers + 1) * state + graph if ranked else 2 * state),
        fit=of_fit + 3 * settings.num_samples * state + moments if compensates else 0,
    )


def check_memory(checkpoint: Checkpoint, settings: PruneSettings, *, processes: int = 1) -> None:
    """Checks that a run will fit.

    Args:
        checkpoint: To be pruned.
        settings: What is asked for.
        processes: How many of the job's ranks share the memory; each holds a model of its own.

    Raises:
        SenteiError: It will not; says how much is needed, and how much there is.
    """
    needed = memory_needed(checkpoint, settings, offload=settings.offload)
    free = available_bytes(torch.device(settings.device))
    if processes * needed.peak <= free:
        return
    ways = []
    less = memory_needed(checkpoint, settings, offload=True)
    each = f" in each of {processes} processes" if processes > 1 else ""
    if not settings.offload and less.peak < needed.peak:
        ways.append(f"add --offload, which needs {_gb(less.peak)}{each}")
    if needed.fit > needed.search:
        ways.append("prune with fewer --samples or --no-compensate")
    if each:
        ways.append("start fewer processes")
    hint = ", ".join([*ways, "or use a larger machine" if ways else "use a larger machine"])
    raise SenteiError(
        f"Pruning {checkpoint.directory} needs at least {_gb(needed.peak)} of memory on {settings.device}{each}, and "
        f"{_gb(free)} are free.",
        f"{hint[0].upper()}{hint[1:]}.",
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2g} GB"
