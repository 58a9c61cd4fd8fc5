"""The versions of vLLM that the plugin works with."""

import logging
import re

from toolchain.errors import SenteiError

# docs/guides/upgrade.md says which of these the plugin was run with, and which were read.
OLDEST_VLLM, NEWEST_VLLM = (0, 25), (0, 33)
_LOG = logging.getLogger("vllm.sentei")  # below vLLM's own, so that it is shown


def check_version(version: str) -> None:
    """Warns of a vLLM that is newer than the newest that was looked at; of a build without a number nothing is known.

    Raises:
        SenteiError: It is older than the oldest.
    """
    if (found := re.match(r"(\d+)\.(\d+)", version)) is None:
        return
    number = int(found[1]), int(found[2])
    oldest, newest = (".".join(map(str, each)) for each in (OLDEST_VLLM, NEWEST_VLLM))
    if number < OLDEST_VLLM:
        raise SenteiError(
            f"vLLM {version} is older than {oldest}, the oldest that sentei's plugin works with.",
            "Install a newer one.",
        )
    if number > NEWEST_VLLM:
        _LOG.warning(
            "vLLM %s is newer than %s, the newest that sentei's plugin was compared with.",
            version, newest,
        )  # fmt: skip
