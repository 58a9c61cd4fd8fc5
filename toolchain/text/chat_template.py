"""A model's chat template, rendered by Transformers in a process of its own, within bounds.

A template is a program that comes with a model. Transformers' sandbox keeps it from files and from the network, not
from running for ever or filling the memory.
"""

import json
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.lifetime import own_environment, tied
from toolchain.text.chat_template_worker import TIME_LIMIT_S

# How the text of a chat ends, in Transformers' words: where an answer is to begin, with the last message, or within it.
Ending = Mapping[str, bool]
ANSWER_BEGINS: Ending = {"add_generation_prompt": True}
WHOLE: Ending = {}
LAST_GOES_ON: Ending = {"continue_final_message": True}
_START_TIMEOUT_S = 120.0
_LONGEST_TEMPLATE = 2**20
MAX_CHARS = 10_000_000


class ChatTemplate:
    """The template, and the process that renders it, which is started at once and again whenever it had to be killed.

    Threads may share it; one chat is rendered at a time.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_chars: int = MAX_CHARS, now: datetime | None = None
    ) -> None:
        """Starts the process.

        Args:
            tokenizer: The model's own.
            max_chars: Of the rendered text.
            now: What a template that writes the date takes for it; the clock says it where there is none.

        Raises:
            SenteiError: There is no template, or several and no default, or the template is no text or too long.
        """
        try:
            template: Any = tokenizer.get_chat_template()
        except ValueError as error:
            raise SenteiError(f"The chat template cannot be used ({error}).") from error
        if not isinstance(template, str) or len(template) > _LONGEST_TEMPLATE:
            raise SenteiError(f"The chat template is not a text of at most {_LONGEST_TEMPLATE:,} characters.")
        special_tokens = dict(tokenizer.special_tokens_map)
        self._chat = {
            "template": template, "special_tokens": special_tokens, "max_chars": max_chars,
            "now": now and now.isoformat(),
        }  # fmt: skip
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = _started()
        self._is_ready = False

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        ending: Ending = ANSWER_BEGINS,
    ) -> str:
        """The text for a chat.

        Args:
            messages: As in OpenAI's API: ``role``, ``content`` and what else the template knows.
            tools: Likewise.
            ending: How the text ends.

        Raises:
            SenteiError: The template refuses the messages, or takes too much time or memory.
        """
        chat = {"messages": list(messages), "tools": tools, "ending": ending}
        try:
            line = json.dumps({**self._chat, **chat}, default=str).encode() + b"\n"
        except (RecursionError, ValueError) as error:
            raise SenteiError("messages: they are too deeply nested.") from error
        with self._turn:
            answer = self._ask(line)
        if "error" in answer:
            raise SenteiError(f"messages: the model's chat template refuses them ({answer['error']}).")
        return answer["text"]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            with self._process:
                self._process = None

    def __enter__(self) -> "ChatTemplate":
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See :meth:`close`."""
        self.close()

    def _ask(self, line: bytes) -> dict[str, str]:
        try:
            if self._process is None:
                self._process, self._is_ready = _started(), False
            if not self._is_ready:
                _read_line(self._process, _START_TIMEOUT_S)
                self._is_ready = True
            assert self._process.stdin
            self._process.stdin.write(line)
            return json.loads(_read_line(self._process, TIME_LIMIT_S))
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            self.close()
            what = f"took more than {TIME_LIMIT_S} s" if isinstance(error, TimeoutError) else "ended its process"
            raise SenteiError(f"The model's chat template {what} and was stopped.") from error


def _started() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "toolchain.text.chat_template_worker"]
    # A session of its own: Ctrl-C in a terminal is for the parent, with which it ends.
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        env=tied(own_environment()),
    )


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """The next line that a process writes.

    Raises:
        TimeoutError: It did not write one in time.
        EOFError: It has ended.
    """
    assert process.stdout
    received, deadline = bytearray(), time.monotonic() + timeout_s
    while not received.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        if not (piece := process.stdout.read(1 << 20)):
            raise EOFError
        received += piece
    return bytes(received)
