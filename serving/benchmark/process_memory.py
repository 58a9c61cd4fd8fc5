"""How much memory a process holds, as Linux counts it."""

from pathlib import Path


def resident_bytes(process: int | str = "self") -> int | None:
    """What a process holds now; ``None`` where the system does not say, or the process is gone."""
    return _status_bytes(process, "VmRSS")


def peak_resident_bytes(process: int | str = "self") -> int | None:
    """The most that it has held so far; ``None`` likewise."""
    return _status_bytes(process, "VmHWM")


def _status_bytes(process: int | str, field: str) -> int | None:
    # Not getrusage: its maximum survives exec, and would be the parent's where that is larger.
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines[field].split()[0]) * 1024 if field in lines else None
