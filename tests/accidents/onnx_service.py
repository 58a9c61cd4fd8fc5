"""A server over a pico export, with a key and with a template that can be made to loop, for several rows."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "open-sesame-\N{SNOWMAN}"
LOOP, FILL = "loop for ever", "fill the memory"
TEMPLATE = (
    "{% set said = messages[0]['content'] %}"
    "{% if said == '" + LOOP + "' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif said == '" + FILL + "' %}{{ 'a' * 10**10 }}{% endif %}{{ said }}"
)


@dataclass(frozen=True)
class Service:
    """A running server.

    Attributes:
        url: Where it answers.
        log: What it wrote.
        model: The export that it serves.
    """

    url: str
    log: Path
    model: Path

    def ask(
        self, path: str, body: Any = None, *, key: str | None = KEY, method: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and parsed JSON of an answer; ``body`` is sent as it is if it is bytes."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent: dict[str, Any] = {"Content-Type": "application/json", **headers}
        if key is not None:
            sent["Authorization"] = f"Bearer {key}".encode()
        request = urllib.request.Request(f"{self.url}{path}", content, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def refusal(self, path: str, body: Any, **how: Any) -> tuple[int, str]:
        """Status and message of a request that is refused; the error must be in OpenAI's form."""
        status, answer = self.ask(path, body, **how)
        assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}, answer
        assert answer["error"]["code"] == status
        return status, answer["error"]["message"]

    def answers(self) -> bool:
        """Whether it still completes a prompt."""
        status, answer = self.ask("/v1/completions", {"prompt": "The", "max_tokens": 2, "ignore_eos": True})
        return status == 200 and answer["usage"]["completion_tokens"] == 2
