"""vLLM's command line, run again and again in one process: importing it takes longer than many a load.

``python -m serving.benchmark.sessions.vllm_client_worker`` speaks JSON lines: on stdin ``{"arguments": [...], "log":
FILE}``, and on stdout an exit code for each. What vLLM prints goes to that file. Ends when stdin closes, and with its
parent.
"""

import json
import os
import sys
import traceback

from serving.server.vllm.launcher import answer_for_vllm_cpu
from serving.server.vllm.options import check_when_parsed
from toolchain.lifetime import end_with_parent


def main() -> None:
    """Runs commands until stdin closes."""
    end_with_parent(reads_stdin=True)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer_for_vllm_cpu()
    check_when_parsed()
    for line in sys.stdin:
        request = json.loads(line)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        code = _run(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(f"{code}\n")
        answers.flush()


def _run(arguments: list[str]) -> int:
    """As the command line ends: with 0, with the code that vLLM exits with, or with 1 and a traceback."""
    sys.argv = ["vllm", *arguments]
    try:
        from vllm.entrypoints.cli.main import main as vllm_main

        vllm_main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # whatever it is, the command failed, and the next may not
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
