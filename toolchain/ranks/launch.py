"""How a process learns that it is one of several: from the variables that torchrun sets. Standard library only.

Slurm and Kubernetes set the same variables, or a line of shell makes them of theirs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from toolchain.errors import SenteiError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher said.

    Attributes:
        rank: Of this process, from 0.
        size: How many processes there are.
        local_rank: Of this process among those on its machine: the number of its GPU.
        local_size: How many those are; ``None`` where the launcher does not say.
        address: Where rank 0, or torchrun on its machine, is to be found.
        port: At that address.
        attempt: How many times torchrun has started the job again.
        has_store: Whether torchrun itself answers at the address; otherwise rank 0 does.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int | None
    address: str
    port: int
    attempt: int
    has_store: bool


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What the launcher said; ``None`` for a process that works alone.

    Raises:
        SenteiError: A variable is missing or makes no sense.
    """
    if not several(environment):
        return None
    if missing := [name for name in _NEEDED if not environment.get(name)]:
        raise SenteiError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, and {missing[0]} is not set.",
            f"Start several processes with torchrun, or set {', '.join(_NEEDED)} in each.",
        )
    size, port = _number(environment, "WORLD_SIZE", lowest=1), _number(environment, "MASTER_PORT", lowest=1)
    rank = _number(environment, "RANK", lowest=0)
    if rank >= size:
        raise SenteiError(f"RANK is {rank}, and WORLD_SIZE is {size}: ranks are numbered from 0.", "Correct them.")
    local_rank, local_size = _number({"LOCAL_RANK": "0", **environment}, "LOCAL_RANK", lowest=0), None
    if environment.get("LOCAL_WORLD_SIZE"):
        local_size = _number(environment, "LOCAL_WORLD_SIZE", lowest=1)
        if local_rank >= local_size:
            raise SenteiError(
                f"LOCAL_RANK is {local_rank}, and LOCAL_WORLD_SIZE is {local_size}: ranks are numbered from 0.",
                "Correct them.",
            )
    return Launch(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        address=environment["MASTER_ADDR"],
        port=port,
        attempt=_number({"TORCHELASTIC_RESTART_COUNT": "0", **environment}, "TORCHELASTIC_RESTART_COUNT", lowest=0),
        has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher says that there are more processes than this one."""
    return environment.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process is the one that writes outputs and tells: rank 0, or a process alone."""
    return not several() or os.environ.get("RANK", "0") == "0"


def _number(environment: Mapping[str, str], name: str, *, lowest: int) -> int:
    text = environment[name]
    if not text.isdecimal() or int(text) < lowest:
        raise SenteiError(f"{name} is {text!r}, which is not a whole number from {lowest} up.", "Correct it.")
    return int(text)
