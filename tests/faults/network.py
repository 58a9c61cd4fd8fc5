"""Programs that cannot reach any network, and a count of what they tried.

They run in a network namespace with loopback and one cable that ends in the same namespace. Every other address and the
only name server are behind the cable. So each packet that leaves by it was an attempt, whichever language or library
made it. A machine that allows no namespaces, or has no ``ip``, gets a hook in Python instead, which sees what Python
code tries, and refuses it.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

# From the ranges for documentation and tests, which nobody has.
_NAME_SERVER, _ADDRESS = "192.0.2.1", "198.18.0.2/24"
_SETUP = f"""
set -e
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || true
mount --bind "$0" /etc/resolv.conf
ip link set lo up
ip link add away type veth peer name nowhere
ip address add {_ADDRESS} dev away
ip link set nowhere up
ip link set away arp off up
ip route add default dev away
echo ready
exec cat
"""
_HOOK = """
import os, sys

def _watch(event, arguments):
    if event == "socket.getaddrinfo":
        where = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        where = arguments[1][0]
    else:
        return
    where = where.decode() if isinstance(where, bytes) else where
    if where not in (None, "", "localhost", "0.0.0.0", "::1") and not where.startswith("127."):
        with open(os.environ["SENTEI_TEST_ATTEMPTS"], "a") as file:
            file.write(f"{event} {where}\\n")
        raise OSError(f"a test allows no network: {event} {where}")

sys.addaudithook(_watch)
"""


@dataclass(frozen=True, kw_only=True)
class NoNetwork:
    """Where programs run.

    Attributes:
        kind: ``namespace`` or ``hook``.
        enter: Words before a command.
        environment: Variables for it.
        attempts_file: What the hook saw.
    """

    kind: str
    enter: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    attempts_file: Path | None = None

    def attempts(self) -> int:
        """Packets that left, or calls that were refused."""
        if self.attempts_file is not None:
            return len(self.attempts_file.read_text().splitlines())
        told = subprocess.run([*self.enter, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True).stdout
        [line] = [line for line in told.splitlines() if line.strip().startswith("away:")]
        return int(line.partition(":")[2].split()[9])  # the second number of what was sent


@contextmanager
def no_network(directory: Path) -> Iterator[NoNetwork]:
    """A namespace if there can be one, and the hook if not. ``directory`` holds what they need."""
    with network_namespace(directory) if namespaces_work() else python_hook(directory) as place:
        yield place


@cache
def namespaces_work() -> bool:
    """Whether this user may build such a namespace here, and has the programs for it."""
    if not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return False
    command = [*_unshare(), "sh", "-c", "ip link add away type veth peer name nowhere && mount -t tmpfs none /mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _unshare() -> list[str]:
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", "--net", "--mount", "--propagation", "private", *as_user]


@contextmanager
def network_namespace(directory: Path) -> Iterator[NoNetwork]:
    """A network namespace that is gone with the context, or with this process."""
    resolver = directory / "resolv.conf"
    resolver.write_text(f"nameserver {_NAME_SERVER}\noptions timeout:1 attempts:1\n")
    command = [*_unshare(), "sh", "-c", _SETUP, str(resolver)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            user = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
            enter = ("nsenter", "--target", str(holder.pid), "--net", "--mount", *user)
            yield NoNetwork(kind="namespace", enter=enter)
        finally:
            holder.kill()


@contextmanager
def python_hook(directory: Path) -> Iterator[NoNetwork]:
    """An audit hook in every Python process that inherits the environment."""
    attempts = directory / "attempts"
    attempts.touch()
    (directory / "hook").mkdir()
    (directory / "hook" / "sitecustomize.py").write_text(_HOOK)
    path = os.pathsep.join(filter(None, [str(directory / "hook"), os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": path, "SENTEI_TEST_ATTEMPTS": str(attempts)}
    yield NoNetwork(kind="hook", environment=environment, attempts_file=attempts)
