"""How often something is called."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

PACKAGES = ("toolchain.", "export.", "serving.")


def calls_of(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Collects the arguments of a function's calls, under whatever module's name it is called."""
    calls: list[tuple[Any, ...]] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **options)

    for module in [module for name, module in sys.modules.items() if name.startswith(PACKAGES)]:
        if getattr(module, function.__name__, None) is function:
            monkeypatch.setattr(module, function.__name__, counted)
    return calls
