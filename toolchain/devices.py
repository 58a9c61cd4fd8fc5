"""The names of devices: one spelling each, so that what is computed and what is recorded agree."""

import re

from toolchain.errors import SenteiError

_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")
_SAME = {"cpu:0": "cpu", "cuda:0": "cuda"}


def parse_device(given: str) -> str:
    """The one name of a device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` and up.

    A CPU has no number in torch's own answers, and the first GPU is what ``cuda`` means.

    Raises:
        SenteiError: No such name.
    """
    name = _SAME.get(given, given)
    if name != "auto" and not _DEVICE.fullmatch(name):
        raise SenteiError(f"--device {given!r} is not a device.", "Use auto, cpu, cuda or cuda:1.")
    return name
