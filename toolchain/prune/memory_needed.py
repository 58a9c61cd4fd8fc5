"""How much memory a run of ``sentei prune`` takes, from shapes alone: said before anything is loaded.

What is counted is what cannot be avoided, so that no run is refused that would have fitted; the rest is a few hundred
megabytes of Python and its libraries. See ``docs/decisions/memory.md``.
"""

from dataclasses import dataclass

import torch

from toolchain.checkpoint.directory import Checkpoint
from toolchain.errors import SenteiError
from toolchain.memory import available_bytes
from toolchain.model.several_gpus import GpusTooSmallError, device_map_for
from toolchain.prune.ridge_fit import fit_bytes
from toolchain.prune.settings import PruneSettings
from toolchain.ranks.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class MemoryNeeded:
    """Bytes at the peak of each part of a run.

    Attributes:
        search: The weights, and what gradients add to them where widths are ranked. With ``--offload`` the weights are
            those of embeddings, head and two layers: one runs, and one waits, no wider than it is stored.
        fit: The weights, the hidden states of all windows and the moments of the widest projection; 0 without
            compensation. With ``--offload`` one layer.
        weights: Those that are in memory all the time.
    """

    search: int
    fit: int
    weights: int

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.search, self.fit)

    @property
    def computing(self) -> int:
        """Of the whole run, beside the weights."""
        return self.peak - self.weights


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
    weights = (outside + layer if offload else checkpoint.num_parameters) * size
    of_search = weights + (layer * min(size, checkpoint.dtype.itemsize) if offload else 0)
    return MemoryNeeded(
        search=of_search + ((layers + 1) * state + graph if ranked else 2 * state),
        fit=weights + 3 * settings.num_samples * state + moments if compensates else 0,
        weights=weights,
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
    each = f" in each of {processes} processes" if processes > 1 else ""
    raise SenteiError(
        f"Pruning {checkpoint.directory} needs at least {_gb(needed.peak)} of memory on {settings.device}{each}, and "
        f"{_gb(free)} are free.",
        _ways_out(checkpoint, settings, each),
    )


def device_map_within(checkpoint: Checkpoint, settings: PruneSettings, ranks: Ranks) -> dict[str, str] | None:
    """Checks that a run will fit into the GPUs of each rank, and says where the parts of the model go.

    What is free is the least that any rank has in the place. So the same layers are together in all ranks, and NCCL,
    which connects GPUs when they first talk, connects those that are to talk to each other.

    Returns:
        The GPU of each part of the model; ``None`` where one device holds it, which is ``settings.device``.

    Raises:
        MissingDependencyError: The model takes several GPUs, and accelerate is not installed.
        SenteiError: It will not fit; says how much is needed, and how much there is.
    """
    gpus = ranks.gpus(torch.cuda.device_count())
    gpus = gpus[: ranks.smallest(len(gpus))]
    if len(gpus) > 1:
        own = torch.tensor([available_bytes(torch.device("cuda", gpu)) for gpu in gpus])
        free = dict(zip(gpus, torch.stack(ranks.gather(own)).amin(0).tolist(), strict=True))
        needed = memory_needed(checkpoint, settings, offload=False)
        try:
            return device_map_for(checkpoint, settings.dtype, free, computing=needed.computing)
        except GpusTooSmallError as error:
            if needed.peak > free[gpus[0]]:
                raise SenteiError(
                    f"Pruning {checkpoint.directory} needs at least {_gb(needed.weights)} for weights, in whole "
                    f"layers, and {_gb(needed.computing)} on each GPU to compute; free on the {len(gpus)} GPUs "
                    f"{'of each process ' if ranks.several else ''}are {' + '.join(map(_gb, free.values()))}.",
                    _ways_out(checkpoint, settings, ""),
                ) from error
    check_memory(checkpoint, settings, processes=ranks.num_sharing(torch.device(settings.device)))
    return None


def _ways_out(checkpoint: Checkpoint, settings: PruneSettings, each: str) -> str:
    """What to do where memory is too small; ``each`` names the processes that share it, if there are several."""
    needed, less = (memory_needed(checkpoint, settings, offload=way) for way in (settings.offload, True))
    ways = []
    if not settings.offload and less.peak < needed.peak:
        ways.append(f"add --offload, which needs {_gb(less.peak)}{each}")
    if needed.fit > needed.search:
        ways.append("prune with fewer --samples or --no-compensate")
    if each:
        ways.append("start fewer processes")
    hint = ", ".join([*ways, "or use a larger machine" if ways else "use a larger machine"])
    return f"{hint[0].upper()}{hint[1:]}."


def _gb(size: int) -> str:
    return f"{size / 1e9:.2g} GB"
