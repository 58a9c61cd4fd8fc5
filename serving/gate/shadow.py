"""The operator's own prompts, answered by both sides beside the traffic: how often do the answers differ?

The original is asked twice. What differs then is chance (of a GPU, with other requests in its batches), and is not the
candidate's fault.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.gate.document import ShadowLimits
from serving.gate.intervals import Blocks
from serving.gate.one_server import RefusedError, UnreachableError, ask, has_secret, is_url, shown
from toolchain.errors import SenteiError
from toolchain.json_files import parse_json, read_json_lines

# Each prompt is answered three times, a few at once, beside the traffic: it takes the operator's servers' time.
MOST_PROMPTS, _AT_ONCE = 1000, 4
_TIMEOUT_S = 120.0
_MOST_BYTES, _MOST_LINE_BYTES = 1024 * 1024, 256 * 1024
_KEY_VARIABLE = "VLLM_API_KEY"
_LINE = 'A line is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.'
_IS_IT = "shadow in gate.yaml names a server of each side, as in http://127.0.0.1:8000."


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """What came out.

    Attributes:
        prompts: How many were asked.
        original_differs: To how many of them the original answered otherwise when it was asked again.
        candidate_differs: To how many the candidate answered otherwise than the original at first, or not at all.
    """

    prompts: int
    original_differs: int
    candidate_differs: int

    def counts(self) -> tuple[tuple[Blocks, Blocks], tuple[Blocks, Blocks]]:
        """For :func:`serving.gate.intervals.share_increase`: events and trials."""
        trials = np.array([self.prompts], float)
        return (np.array([self.original_differs], float), np.array([self.candidate_differs], float)), (trials, trials)


@dataclass(frozen=True)
class _Prompt:
    where: str
    path: str
    body: Mapping[str, Any]


def read_prompts(path: Path) -> tuple[_Prompt, ...]:
    """Reads the prompts.

    Raises:
        SenteiError: The file cannot be read, has no prompts or more than :data:`MOST_PROMPTS`, or a line is none.
    """
    found: list[_Prompt] = []
    for where, line in read_json_lines(path, hint=_LINE, max_bytes=_MOST_LINE_BYTES):
        if len(found) == MOST_PROMPTS:
            raise SenteiError(f"{path} has more than {MOST_PROMPTS:,} prompts.", "Each costs three answers: choose.")
        found.append(_prompt(where, line))
    if not found:
        raise SenteiError(f"{path} has no prompts.", _LINE)
    return tuple(found)


def _prompt(where: str, line: object) -> _Prompt:
    if isinstance(line, dict):
        prompt, messages = line.get("prompt"), line.get("messages")
        if isinstance(prompt, str) and prompt and messages is None:
            return _Prompt(where, "/v1/completions", {"prompt": prompt})
        if prompt is None and isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return _Prompt(where, "/v1/chat/completions", {"messages": messages})
    raise SenteiError(f"{where} is no prompt.", _LINE)


def _is_message(each: object) -> bool:
    return (
        isinstance(each, dict) and each.keys() == {"role", "content"} and all(isinstance(v, str) for v in each.values())
    )


def compare(asked: ShadowLimits, prompts: Sequence[_Prompt]) -> Shadow:
    """Has both sides answer.

    A key is taken from ``VLLM_API_KEY``, as the servers take it.

    Args:
        asked: Whom to ask, and for how much.
        prompts: What.

    Raises:
        SenteiError: A side cannot be asked, or the original refuses a prompt, or answers one without text.
    """
    original, candidate = (
        _Server(side, url) for side, url in (("original", asked.original), ("candidate", asked.candidate))
    )

    def differ(prompt: _Prompt) -> tuple[bool, bool]:
        first, again = (original.answer(prompt, asked.max_tokens) for _ in range(2))
        return first != again, first != candidate.answer(prompt, asked.max_tokens, may_refuse=True)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            found = list(pool.map(differ, prompts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Shadow(
        prompts=len(found), original_differs=sum(own for own, _ in found), candidate_differs=sum(it for _, it in found)
    )


class _Server:
    """One side's server, by its OpenAI endpoints."""

    def __init__(self, side: str, url: str) -> None:
        if not is_url(url):
            raise SenteiError(f"{url!r} is not the URL of a server.", _IS_IT)
        if has_secret(url):
            raise SenteiError(f"The URL of the {side} holds a name or a password.", f"Set {_KEY_VARIABLE} instead.")
        self._side, self._url = side, url.rstrip("/")
        key = os.environ.get(_KEY_VARIABLE)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._model = self._name()

    def _name(self) -> str:
        try:
            found = self._object("/v1/models", None)["data"][0]["id"]
        except RefusedError as error:
            raise self._refused(error, "") from error
        except (KeyError, IndexError, TypeError) as error:
            raise SenteiError(f"{self._url} does not say what models it has.", _IS_IT) from error
        if not isinstance(found, str):
            raise SenteiError(f"{self._url} does not say what models it has.", _IS_IT)
        return found

    def answer(self, prompt: _Prompt, max_tokens: int, *, may_refuse: bool = False) -> tuple[str, str] | None:
        """The greedy answer, reasoning first; ``None`` where the server refuses, or answers with something else."""
        body = {**prompt.body, "model": self._model, "max_tokens": max_tokens, "temperature": 0}
        try:
            texts = _texts(self._object(prompt.path, json.dumps(body).encode())["choices"][0])
        except RefusedError as error:
            if may_refuse:
                return None
            raise self._refused(error, f" to {prompt.where}") from error
        except (KeyError, IndexError, TypeError) as error:
            if may_refuse:
                return None
            raise SenteiError(f"{self._url} does not answer as an OpenAI server does.", _IS_IT) from error
        if not any(texts) and not may_refuse:
            raise SenteiError(
                f"The {self._side} at {self._url} answers {prompt.where} without text: there is nothing to compare.",
                "Raise max_tokens of shadow, or leave this prompt out.",
            )
        return texts

    def _object(self, path: str, body: bytes | None) -> Any:
        try:
            content = ask(
                f"{self._url}{path}", timeout_s=_TIMEOUT_S, most_bytes=_MOST_BYTES, body=body, headers=self._headers
            )
        except UnreachableError as error:
            raise SenteiError(f"The {self._side} cannot be asked at {self._url} ({error}).", _IS_IT) from error
        if len(content) > _MOST_BYTES:
            raise SenteiError(f"{self._url} answers with more than {_MOST_BYTES:,} bytes.", _IS_IT)
        return parse_json(content, f"What {self._url} answers", hint=_IS_IT)

    def _refused(self, error: RefusedError, what: str) -> SenteiError:
        hint = f"Set {_KEY_VARIABLE} to the servers' key." if error.status == 401 else _IS_IT
        said = shown(error.content.decode("utf-8", "replace")) or error
        return SenteiError(f"The {self._side} at {self._url} answers {error.status}{what} ({said}).", hint)


def _texts(choice: Any) -> tuple[str, str]:
    """Reasoning, which servers with a reasoning parser keep apart, and the answer proper; either may be empty.

    Raises:
        KeyError, TypeError: This is no answer of an OpenAI server.
    """
    if "message" not in choice:
        found = None, choice["text"]
    elif isinstance(message := choice["message"], dict):
        # vLLM's name, and the one that it and others had before.
        found = message.get("reasoning") or message.get("reasoning_content"), message.get("content")
    else:
        raise TypeError(type(message))
    if not all(isinstance(text, str | None) for text in found):
        raise TypeError(found)
    return found[0] or "", found[1] or ""
