"""The command line: parses, calls, prints. Nothing heavy is imported before a command runs."""

import signal
import sys
from pathlib import Path

# Ctrl-C while the program is still being loaded ends it without a word; later toolchain.cli.app.main says so.
if [Path(each).name for each in sys.argv[:1]] == ["sentei"] and signal.getsignal(
    signal.SIGINT
) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
