"""Numbers and nested JSON as text for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.report.translate import Say


def flatten(content: Mapping[str, Any], say: Say, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as ``(dotted name, text)`` rows, in the order of the file."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten(value, say, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and all(isinstance(item, Mapping) for item in value):
                for index, item in enumerate(value):
                    rows += flatten(item, say, f"{name}.{index}.")
            else:
                rows.append((name, ", ".join(_text(item, say) for item in value) or say("none")))
        else:
            rows.append((name, format_bytes(value) if _is_bytes(name, value) else _text(value, say)))
    return rows


def _is_bytes(name: str, value: Any) -> bool:
    return name.endswith("_bytes") and isinstance(value, int)


def _text(value: Any, say: Say) -> str:
    if value is None:
        return say("not known")
    if isinstance(value, bool):
        return say("yes") if value else say("no")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def format_bytes(count: int) -> str:
    """Bytes with a decimal unit."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def format_count(count: int) -> str:
    """A number of parameters, as people say it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def format_ratio(ratio: float) -> str:
    """Two digits after the point, or two significant ones where those would say nothing."""
    return f"{ratio:.2f}" if 0.1 <= ratio < 100 else f"{ratio:.2g}" if ratio < 0.1 else f"{ratio:.0f}"


def format_change(ratio: float) -> str:
    """A ratio as a signed percentage."""
    percent = 100 * (ratio - 1)
    return "±0 %" if abs(percent) < 0.05 else f"{percent:+.{1 if abs(percent) < 100 else 0}f} %".replace("-", "−")
