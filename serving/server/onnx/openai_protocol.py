"""OpenAI's completions and chat completions: what a request may say, and what is answered.

Field names and defaults are OpenAI's; ``top_k`` and ``ignore_eos`` are vLLM's. A field that would change the answer
and is not known here is refused, not passed over.
"""

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.engines.sampling import Sampling
from toolchain.errors import SenteiError

# Each is looked for after each token, between the tokens of everybody else.
_MOST_STOP_STRINGS, _LONGEST_STOP_STRING = 64, 256

FinishReason = Literal["stop", "length"]
_StopString = Annotated[str, Field(max_length=_LONGEST_STOP_STRING)]


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(0, ge=-1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: _StopString | Annotated[list[_StopString], Field(max_length=_MOST_STOP_STRINGS)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    user: str | None = None
    # Known, but only as what changes nothing.
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    repetition_penalty: float = Field(1, ge=1, le=1)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, fields: Any) -> Any:
        return (
            {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields
        )

    @property
    def sampling(self) -> Sampling:
        """How tokens are picked.

        Raises:
            SenteiError: A number is out of range.
        """
        top_k = max(self.top_k, 0)  # vLLM's -1 is all, too
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=top_k, seed=self.seed)

    @property
    def stop_strings(self) -> list[str]:
        """Each ends the answer, and is not in it."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text]


class CompletionRequest(_Request):
    """Of ``/v1/completions``."""

    # The first wrong element is enough: a list of a million would make a million errors.
    prompt: (
        str
        | Annotated[list[int], Field(fail_fast=True)]
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[list[int]], Field(fail_fast=True)]
    )
    best_of: Literal[1] = 1
    echo: Literal[False] = False

    @property
    def single_prompt(self) -> str | list[int]:
        """Text, or token ids.

        Raises:
            SenteiError: There are several prompts.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise SenteiError(f"prompt: {len(prompt)} prompts are in one request.", "Send one request each.")
            return prompt[0]
        return prompt


class ChatCompletionRequest(_Request):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def text_messages(self) -> list[dict[str, Any]]:
        """The messages for a chat template, their content as one string.

        Raises:
            SenteiError: A message holds something else than text, or does not say who speaks.
        """
        for message in self.messages:
            if not isinstance(message.get("role"), str):
                raise SenteiError("messages: role must be a string.")
        return [{**message, "content": _text(message.get("content"))} for message in self.messages]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    try:
        if any(part.get("type", "text") != "text" for part in content):
            raise TypeError("a part that is no text")
        return "".join(part["text"] for part in content)
    except (TypeError, KeyError, AttributeError) as error:
        raise SenteiError("messages: content must be a string, or a list of parts of type text.") from error


class Reply:
    """What is sent back to one request, whole or in chunks."""

    def __init__(self, *, chat: bool, model: str, prompt_tokens: int) -> None:
        """Gives the answer an id and a time."""
        self._chat, self._prompt_tokens = chat, prompt_tokens
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish_reason: FinishReason, completion_tokens: int) -> dict[str, Any]:
        """All of the answer."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        usage = self._usage(completion_tokens)
        return self._object("chat.completion", [self._choice(said, finish_reason)]) | {"usage": usage}

    def chunk(self, text: str, finish_reason: FinishReason | None, *, first: bool) -> dict[str, Any]:
        """A piece of the answer; the first one of a chat says who speaks."""
        role = {"role": "assistant"} if first else {}
        said: dict[str, Any] = {"delta": {**role, "content": text}} if self._chat else {"text": text}
        return self._chunk([self._choice(said, finish_reason)])

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """The last one, of those who asked for it."""
        return self._chunk([]) | {"usage": self._usage(completion_tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._object("chat.completion.chunk", choices)

    def _object(self, of_chat: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": of_chat if self._chat else "text_completion", "choices": choices}

    def _choice(self, said: Mapping[str, Any], finish_reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }
