"""Clients that ask all the time, and what became of each of their requests: none is forgotten."""

import asyncio
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp

PATH = "/v1/completions"
# So many requests wait for their answer at once; further ones are not sent, and are counted.
MOST_AT_ONCE = 400
_PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request and its end.

    Attributes:
        sent_s: When it was sent, by :func:`time.monotonic`.
        ended_s: When it ended.
        is_stream: Whether it asked for a stream.
        has_begun: Whether there was an answer with status 200.
        problem: What is wrong with the answer, empty if nothing is.
        side: Whose answer it is, or, of one that broke off, whose answer began like that; empty where that is open.
    """

    sent_s: float
    ended_s: float
    is_stream: bool
    has_begun: bool
    problem: str
    side: str


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what each side answers to it when it is alone."""

    body: Mapping[str, Any]
    answers: Mapping[str, str]

    def side_of(self, text: str) -> str:
        """Whose answer this is the beginning of."""
        found = [side for side, answer in self.answers.items() if text and answer.startswith(text)]
        return found[0] if len(found) == 1 else ""


class Load:
    """Requests at random times, so many per second on average, while the context lasts."""

    def __init__(self, url: str, key: str, prompts: Sequence[Prompt], *, per_s: float, most: int) -> None:
        """Sends nothing yet.

        Args:
            url: Of the router.
            key: Its servers' key.
            prompts: What is asked.
            per_s: Requests per second.
            most: Requests in all.
        """
        self._url, self._key, self._prompts, self._per_s, self._most = url, key, prompts, per_s, most
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.requests: list[Request] = []
        self.not_sent = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        """Waits for the answers to all that was sent."""
        self._ending.set()
        self._thread.join(_PATIENCE_S + 10)
        assert kind is not None or not self._thread.is_alive()

    async def _run(self) -> None:
        draw = random.Random(0)
        under_way: set[asyncio.Task[None]] = set()
        connector = aiohttp.TCPConnector(limit=0)
        headers, timeout = {"Authorization": f"Bearer {self._key}"}, aiohttp.ClientTimeout(total=_PATIENCE_S)
        async with aiohttp.ClientSession(self._url, connector=connector, headers=headers, timeout=timeout) as session:
            due = time.monotonic()
            for _ in range(self._most):
                due += draw.expovariate(self._per_s)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if self._ending.is_set():
                    break
                if len(under_way) >= MOST_AT_ONCE:
                    self.not_sent += 1
                    continue
                task = asyncio.create_task(self._ask(session, draw.choice(self._prompts), draw.random() < 0.5))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await asyncio.gather(*under_way)

    async def _ask(self, session: aiohttp.ClientSession, prompt: Prompt, is_stream: bool) -> None:
        sent_s, has_begun, text, problem = time.monotonic(), False, "", ""
        try:
            async with session.post(PATH, json={**prompt.body, "stream": is_stream}) as response:
                has_begun = response.status == 200
                if not has_begun:
                    problem = f"status {response.status}"
                elif not is_stream:
                    text = (await response.json())["choices"][0]["text"]
                else:
                    problem = "broken off"
                    async for line in response.content:
                        if line == b"data: [DONE]\n":
                            problem = ""
                        elif line.startswith(b"data: "):
                            event = json.loads(line[6:])
                            if "error" in event:
                                problem = "an error in the stream"
                                break
                            text += event["choices"][0]["text"]
        except (aiohttp.ClientError, TimeoutError) as error:
            problem = type(error).__name__
        if not problem and text not in prompt.answers.values():
            problem = "another text than either model writes"
        self.requests.append(
            Request(
                sent_s=sent_s, ended_s=time.monotonic(), is_stream=is_stream, has_begun=has_begun, problem=problem,
                side=prompt.side_of(text),
            )
        )  # fmt: skip
