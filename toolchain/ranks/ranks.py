"""What the ranks of a job say to each other: arrays and JSON, never pickled objects.

``torch.distributed`` sends objects by pickle, which runs what code the sender likes. Here numbers travel as tensors,
and everything else as the bytes of JSON and safetensors. A process that works alone is a job of one rank, and needs no
``torch.distributed``.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save

from toolchain.errors import SenteiError, reason_of
from toolchain.json_files import first_difference
from toolchain.memory import available_bytes
from toolchain.ranks.heartbeat import Heartbeats

_SHORTEST_NAP_S, _LONGEST_NAP_S = 0.00005, 0.002


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a job. Every method that talks is to be called by all of them, in the same order.

    Attributes:
        rank: Of this process.
        size: How many there are.
        local_rank: Of this process on its machine.
        local_size: How many there are on its machine.
        hosts: The machine of each rank.
        heartbeats: Who is alive; ``None`` in a process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    hosts: tuple[str, ...] = ("",)
    heartbeats: Heartbeats | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes and tells."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is anybody to talk to."""
        return self.size > 1

    def num_sharing(self, device: torch.device) -> int:
        """How many ranks share the memory of a device: all of this machine on a CPU; a GPU has one."""
        return self.hosts.count(self.hosts[self.rank]) if device.type == "cpu" else 1

    def gpus(self, count: int) -> range:
        """The numbers of this rank's GPUs: the ``count`` GPUs of its machine, divided evenly among its ranks there.

        The first is the one that the rank has where each takes one.
        """
        return range(self.local_rank, count - count % self.local_size, self.local_size)

    def free_bytes(self, device: torch.device) -> int:
        """This rank's part of what is free on a device, where all that share it ask at the same time."""
        return available_bytes(device) // self.num_sharing(device)

    def share(self, count: int) -> range:
        """This rank's part of ``count`` things in a row."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks in their order, on the CPU; shape and dtype are the same everywhere."""
        if not self.several:
            return [tensor]
        import torch.distributed as dist

        own = tensor.cpu().contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._finish(lambda: dist.all_gather(found, own, async_op=True))
        return found

    def gather_rows(self, own: torch.Tensor | None, counts: Sequence[int]) -> list[torch.Tensor]:
        """Rows of all ranks, of which each has its own number: float64 ``[counts[rank], size]`` each, on the CPU.

        Args:
            own: This rank's, ``[counts[rank], size]``; ``None`` if it has none. It learns here how long a row is.
            counts: How many rows each rank has.
        """
        if not self.several:
            assert own is not None
            return [own.double().cpu()]
        size = self._largest(0 if own is None else own.shape[1])
        padded = torch.zeros(max(counts), size, dtype=torch.float64)
        if own is not None:
            padded[: len(own)] = own
        return [rows[:count] for rows, count in zip(self.gather(padded), counts, strict=True)]

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return min(int(each) for each in self.gather(torch.tensor(number)))

    def _largest(self, number: int) -> int:
        return max(int(each) for each in self.gather(torch.tensor(number)))

    def add(self, tensor: torch.Tensor) -> None:
        """Puts the sum over all ranks into the tensor, on its device; in the same order of additions in every run."""
        if self.several:
            import torch.distributed as dist

            self._finish(lambda: dist.all_reduce(tensor, async_op=True))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Puts ``source``'s values into the tensor, on its device; shape and dtype are the same everywhere."""
        if self.several:
            import torch.distributed as dist

            self._finish(lambda: dist.broadcast(tensor, source, async_op=True))

    def from_first(
        self, document: Any = None, arrays: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """What rank 0 has: a document that is plain JSON, and named tensors, which arrive on the CPU."""
        if not self.several:
            return document, dict(arrays or {})
        head = json.loads(self._bytes_from_first(json.dumps(document).encode()))
        tensors = {name: each.cpu().contiguous() for name, each in (arrays or {}).items()}
        return head, load(self._bytes_from_first(save(tensors) if self.is_first else b""))

    def exchange(self, tensors: Mapping[int, Sequence[torch.Tensor]], counts: Sequence[int]) -> list[torch.Tensor]:
        """Hands tensors, all of one shape and dtype, to other ranks.

        Args:
            tensors: On any device, for each rank.
            counts: How many come from each rank.

        Returns:
            Those that came, by rank, on the CPU and without their shape and dtype: uint8 ``[num_bytes]`` each.
        """
        import torch.distributed as dist

        sent = [[each.cpu().contiguous().view(torch.uint8).flatten() for each in tensors.get(to, ())]
                for to in range(self.size)]  # fmt: skip
        flat = [each for some in sent for each in some]
        # Ranks that send nothing learn the size too: everybody knows one, or nobody has anything.
        size = self._largest(flat[0].numel() if flat else 0)
        into = torch.empty(size * sum(counts), dtype=torch.uint8)
        out = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)
        incoming, outgoing = [size * count for count in counts], [size * len(some) for some in sent]
        self._finish(lambda: dist.all_to_all_single(into, out, incoming, outgoing, async_op=True))
        return list(into.split(size)) if sum(counts) else []

    def check_same(self, what: Mapping[str, Any]) -> None:
        """Compares what the ranks are about to do with what rank 0 is.

        Args:
            what: Plain JSON; nested.

        Raises:
            SenteiError: On all ranks alike; names the lowest rank that differs and the first difference.
        """
        if not self.several:
            return
        # As JSON has it: lists for tuples, texts for the keys.
        own = json.loads(json.dumps(what))
        first, _ = self.from_first(own)
        difference = ""
        if found := first_difference(first, own):
            place, wanted, here = found
            difference = f"{place} ({here}, not {wanted})"
        for rank, said in enumerate(self._texts(difference)):
            if said:
                raise SenteiError(
                    f"Rank {rank} of {self.size} ({self.hosts[rank]}) differs from rank 0 ({self.hosts[0]}) in {said}.",
                    "Give all ranks the same model, text and options.",
                )

    def _texts(self, own: str) -> list[str]:
        """A short text of each rank."""
        content = own.encode()
        longest = self._largest(len(content))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        return [bytes(each.tolist()).rstrip(b"\0").decode() for each in self.gather(padded)]

    def _bytes_from_first(self, content: bytes) -> bytes:
        import torch.distributed as dist

        size = torch.tensor(len(content))
        self._finish(lambda: dist.broadcast(size, 0, async_op=True))
        sent = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)
        own = sent if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        self._finish(lambda: dist.broadcast(own, 0, async_op=True))
        return own.numpy().tobytes()

    def _finish(self, begin: Callable[[], Any]) -> None:
        """Waits for what all ranks do together, as long as all of them live.

        Raises:
            RankLost: One does not, or did not say so before the connection broke.
        """
        assert self.heartbeats is not None
        nap = _SHORTEST_NAP_S
        try:
            work = begin()
            # Not work.wait(), which nothing but its own timeout would interrupt.
            while not work.is_completed():
                self.heartbeats.check()
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP_S)
            work.wait()
        except RuntimeError as error:
            raise self.heartbeats.lost(reason_of(error)[:200]) from error


ALONE = Ranks()
