"""``sentei``, the program: Ctrl-C is one word, also while everything else is still being imported."""

import sys


def main() -> None:
    """Runs :func:`toolchain.cli.app.main`."""
    try:
        from toolchain.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    run()
