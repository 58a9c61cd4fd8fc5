"""Says at the end how many spoiled files were read."""

from collections import Counter

import pytest

READ: Counter[str] = Counter()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if READ:
        refused = sum(count for name, count in READ.items() if name.endswith(" refused"))
        read = READ.total() - refused
        terminalreporter.write_line(f"{read + refused} spoiled files: {refused} refused in a sentence, {read} read.")
