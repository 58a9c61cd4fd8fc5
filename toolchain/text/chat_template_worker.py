"""Renders chat templates within bounds: ``python -m toolchain.text.chat_template_worker``.

JSON lines: one chat on stdin, one text or error on stdout; an empty object first, when it is ready. It ends when stdin
closes, and so with its parent; at the latest when its processor time is used up.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from toolchain.lifetime import end_with_parent

MEMORY_BYTES = 512 * 2**20  # more than the process has when it is ready
TIME_LIMIT_S = 5
_LONGEST_REASON = 300


def main() -> None:
    """Answers until stdin closes."""
    end_with_parent(reads_stdin=True)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    with suppress(BrokenPipeError):  # the parent has ended
        answers.write(b"{}\n")
        for line in sys.stdin.buffer:
            _limit_time()
            answer = json.dumps(_answer(render_jinja_template, json.loads(line)))
            answers.write(answer.encode() + b"\n")


def _answer(render: Callable[..., Any], chat: dict[str, Any]) -> dict[str, str]:
    # In place of Transformers' own, which asks the clock.
    date = {"strftime_now": datetime.fromisoformat(chat["now"]).strftime} if chat["now"] else {}
    try:
        rendered, _ = render(
            [chat["messages"]], chat_template=chat["template"], tools=chat["tools"], **chat["ending"],
            **chat["special_tokens"], **date,
        )  # fmt: skip
        if len(text := rendered[0]) > chat["max_chars"]:
            return {"error": f"it makes more than {chat['max_chars']:,} characters of them"}
        text.encode()  # a template can write half a character
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES // 2**20} MB"}
    except Exception as error:  # whatever a template makes go wrong
        reason = str(error)[:_LONGEST_REASON].encode("utf-8", "replace").decode()
        return {"error": reason or type(error).__name__}
    return {"text": text}


def _limit_memory() -> None:
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        _limit(resource.RLIMIT_AS, int(lines["VmSize"].split()[0]) * 1024 + MEMORY_BYTES)


def _limit_time() -> None:
    """The parent ends this process in time; this holds where it has ended and a template keeps the interpreter busy."""
    _limit(resource.RLIMIT_CPU, int(time.process_time()) + 2 * TIME_LIMIT_S)


def _limit(what: int, limit: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    with suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(what, (limit, hard))


if __name__ == "__main__":
    main()
