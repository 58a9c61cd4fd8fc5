"""Whether vLLM can start in the environment in which a user started sentei."""

import os
import tempfile

from toolchain.errors import SenteiError

# Linux allows a socket's path 107 bytes. vLLM appends a slash and a name of 36 characters to the directory.
_LONGEST_SOCKET_PLACE = 107 - 1 - 36


def check_socket_place() -> None:
    """Checks that vLLM's processes can open the sockets by which they talk to each other.

    Raises:
        SenteiError: The directory for temporary files, where these are, has too long a path.
    """
    place = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
    if len(os.fsencode(place)) > _LONGEST_SOCKET_PLACE:
        raise SenteiError(
            f"vLLM cannot open sockets in {place}: its path is longer than {_LONGEST_SOCKET_PLACE} bytes.",
            "Set TMPDIR to a directory with a shorter path, such as /tmp.",
        )


def check_plugins() -> None:
    """Checks that vLLM will load sentei's plugin.

    Raises:
        SenteiError: ``VLLM_PLUGINS`` names others alone.
    """
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None and "sentei" not in named.split(","):
        raise SenteiError(
            f"VLLM_PLUGINS={named} leaves out sentei's plugin, which pruned checkpoints need.",
            f"Unset it, or set VLLM_PLUGINS={','.join(filter(None, [named, 'sentei']))}.",
        )
