"""Joining the job that a launcher started, and leaving it: in all the job's ranks, one tells how it ended."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from toolchain.errors import INTERRUPTED, SenteiError, is_out_of_memory, reason_of
from toolchain.ranks.heartbeat import BEAT_S, Heartbeats, RankLost, beat_key
from toolchain.ranks.launch import Launch, is_first, launch, several
from toolchain.ranks.ranks import ALONE, Ranks

# Other ranks may still be starting; once they have, a minute without a sign of life is too long.
_JOIN_S, _SILENCE_S = 300.0, 60.0
# Both, for jobs whose processes start or pause more slowly or that shall give up sooner.
TIMEOUT_VARIABLE = "SENTEI_RANK_TIMEOUT_S"
# Heartbeats say when to stop waiting, and not how long a rank computes.
_FOREVER = timedelta(days=365)
_NOT_YET_S = 0.1
# A library that finds out by itself that a rank is lost gets so long to say so.
_LIBRARY_S = 10.0

# One process is in one job, as torch.distributed has it too.
_joined: Ranks | None = None
_is_joining = False


def join() -> Ranks:
    """The ranks of the job that this process belongs to; joins it at the first call.

    Nothing listens but at the launcher's address and, for connections between the ranks, where
    ``GLOO_SOCKET_IFNAME`` says; on the machine itself alone if the launcher's address is 127.0.0.1.

    Raises:
        SenteiError: The variables make no sense, nobody answers at ``MASTER_ADDR``, or a rank does not come.
    """
    global _joined, _is_joining
    if _joined is not None:
        return _joined
    _is_joining = several()
    if (launched := launch()) is None:
        return ALONE
    _joined = _join(launched)
    return _joined


def last_word(sentence: str, exit_code: int) -> tuple[str, int]:
    """Tells the other ranks how this one ends, and finds out what this one has to say.

    Args:
        sentence: Why; empty for a good end.
        exit_code: Of this process.

    Returns:
        What to tell the user, empty if another rank does, and the exit code.
    """
    if _joined is None or _joined.heartbeats is None:
        # All ranks see alike what is wrong with the command itself. Who cannot join has nobody to speak for it.
        speaks = is_first() or (_is_joining and exit_code != INTERRUPTED)
        return (sentence if speaks else ""), exit_code
    beats = _joined.heartbeats
    if not beats.say_last_word(sentence, exit_code):
        return sentence, exit_code
    if exit_code == INTERRUPTED and (lost := beats.why_interrupted()) is not None:
        sentence, exit_code = str(lost), lost.exit_code
    beats.leave()
    if _joined.is_first:
        beats.wait_for_others()  # for whom the store may be in this process
    return (sentence if beats.speaks else ""), exit_code


def end(exit_code: int) -> None:
    """Ends a rank of a broken job at once: what it still waits for would hold the interpreter's own end up."""
    if exit_code and _joined is not None and _joined.several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


@contextmanager
def library_waits(ranks: Ranks) -> Iterator[None]:
    """For a library that waits for the other ranks in its own way, which no signal interrupts.

    Where it goes on waiting for a rank that is lost, this process tells so and ends, as if it had been killed.

    Raises:
        RankLost: The library noticed that a rank is lost.
    """
    beats = ranks.heartbeats
    if beats is None:
        yield
        return
    left = threading.Event()
    threading.Thread(target=_watch, args=(beats, left), name="watch", daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or (lost := beats.why_interrupted()) is None:
            raise
        raise lost from error
    finally:
        left.set()


def _watch(beats: Heartbeats, left: threading.Event) -> None:
    while not left.wait(BEAT_S):
        try:
            beats.check()
        except RankLost as lost:
            if left.wait(_LIBRARY_S):
                return
            sentence, exit_code = last_word(str(lost), lost.exit_code)
            if sentence:
                sys.stderr.write(f"Error: {sentence}\n")
            end(exit_code)


def _join(launched: Launch) -> Ranks:
    import torch.distributed as dist

    given = os.environ.get(TIMEOUT_VARIABLE)
    patience = timedelta(seconds=_seconds(given) if given else _JOIN_S)
    deadline = time.monotonic() + patience.total_seconds()
    try:
        tcp = _store(launched, patience, deadline)
        store = dist.PrefixStore(f"sentei/{launched.attempt}", tcp)
        hosts = _meet(store, launched, deadline)
        _only_loopback(launched)
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() and _sees_gpu() else "gloo"
        dist.init_process_group(backend, store=store, rank=launched.rank, world_size=launched.size, timeout=patience)
        dist.group.WORLD.set_timeout(_FOREVER)  # type: ignore[union-attr]
    except RuntimeError as error:
        raise SenteiError(
            f"Rank {launched.rank} of {launched.size} ({socket.gethostname()}) could not join the others "
            f"({reason_of(error)[:200]}).",
            "Let the machines reach each other; GLOO_SOCKET_IFNAME names the network interface to use.",
        ) from error
    beats = Heartbeats(
        dist.PrefixStore(f"sentei/{launched.attempt}", tcp.clone()),
        rank=launched.rank,
        hosts=hosts,
        silence_s=_seconds(given) if given else _SILENCE_S,
        first_holds_store=not launched.has_store,
    )
    beats.start()
    return Ranks(
        rank=launched.rank,
        size=launched.size,
        local_rank=launched.local_rank,
        local_size=launched.local_size or hosts.count(hosts[launched.rank]),
        hosts=hosts,
        heartbeats=beats,
    )


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise SenteiError(f"{TIMEOUT_VARIABLE} is {given!r}.", "Give seconds, such as 60.")
    return max(seconds, 4 * BEAT_S)


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _store(launched: Launch, patience: timedelta, deadline: float) -> Any:
    """The job's store: rank 0 holds it, or the launcher does."""
    import torch.distributed as dist

    holds = launched.rank == 0 and not launched.has_store
    listening = _listen(launched) if holds else None
    if not holds:
        _wait_for_answer(launched, deadline)
    return dist.TCPStore(
        launched.address, launched.port, is_master=holds, timeout=patience, wait_for_workers=False,
        master_listen_fd=listening,
    )  # fmt: skip


def _listen(launched: Launch) -> int:
    """A socket at the launcher's address alone: the store's own would listen at every address of the machine."""
    try:
        found = socket.getaddrinfo(launched.address, launched.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family).detach()
    except OSError as error:
        raise SenteiError(
            f"Rank 0 cannot listen at MASTER_ADDR {launched.address}, port {launched.port} ({reason_of(error)}).",
            "MASTER_ADDR is an address of rank 0's machine, and MASTER_PORT is free there.",
        ) from error


def _wait_for_answer(launched: Launch, deadline: float) -> None:
    """Tries until somebody answers; torch's own attempts could not be interrupted."""
    while True:
        try:
            socket.create_connection((launched.address, launched.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise SenteiError(
                    f"Rank {launched.rank} of {launched.size} ({socket.gethostname()}): nobody answers at MASTER_ADDR "
                    f"{launched.address}, port {launched.port} ({reason_of(error)}).",
                    f"Start rank 0 there, and let this machine reach it; {TIMEOUT_VARIABLE} is how long to wait.",
                ) from error
        time.sleep(_NOT_YET_S)


def _meet(store: Any, launched: Launch, deadline: float) -> tuple[str, ...]:
    """Waits until all ranks are there; returns their machines' names."""
    store.set(f"host/{launched.rank}", socket.gethostname())
    store.set(beat_key(launched.rank), "{}")
    hosts = []
    for rank in range(launched.size):
        while not store.check([beat_key(rank)]):
            if time.monotonic() > deadline:
                raise SenteiError(
                    f"Rank {rank} of {launched.size} did not come.",
                    f"Start all ranks; {TIMEOUT_VARIABLE} is how long to wait.",
                )
            time.sleep(_NOT_YET_S)
        hosts.append(store.get(f"host/{rank}").decode())
    return tuple(hosts)


def _only_loopback(launched: Launch) -> None:
    """Keeps connections between the ranks on the machine if the launcher did."""
    address = socket.getaddrinfo(launched.address, launched.port, type=socket.SOCK_STREAM)[0][4][0]
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback and (str(address).startswith("127.") or address == "::1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
