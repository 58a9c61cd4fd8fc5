"""Asks a Prometheus for the samples of some metrics over a window, and reads its answer as one reads a stranger's."""

import math
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.gate.one_server import RefusedError, UnreachableError, ask, has_secret, is_url, shown
from toolchain.documents import check_document
from toolchain.errors import SenteiError
from toolchain.json_files import parse_json

DEFAULT_URL = "http://127.0.0.1:9090"
_TIMEOUT_S = 30.0
# About a hundred servers.
_MOST_BYTES = 16 * 1024 * 1024
_IS_IT = "Is this the URL of a Prometheus? Its pages show queries at /graph."


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series: its labels, with the metric's name as ``__name__``, and its samples (time in s, value) in order."""

    labels: dict[str, str]
    samples: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of time, by Prometheus' own clock.

    Attributes:
        end_s: Unix time.
        length_s: Its length.
        step_s: Time between samples; a sample is what Prometheus last knew.
    """

    end_s: float
    length_s: int
    step_s: int

    @property
    def start_s(self) -> float:
        """Unix time."""
        return self.end_s - self.length_s


class Prometheus:
    """The HTTP API of one Prometheus (or of Thanos, Mimir or VictoriaMetrics, which have the same)."""

    def __init__(self, url: str) -> None:
        """Asks nothing yet.

        Args:
            url: With a path before ``/api`` where a proxy has put one.

        Raises:
            SenteiError: This is no URL that can be asked.
        """
        if not is_url(url):
            raise SenteiError(f"{url!r} is not the URL of a Prometheus.", f"Write it as in {DEFAULT_URL}.")
        if has_secret(url):
            raise SenteiError(
                "The URL of Prometheus holds a name or a password, which all users of this machine can read.",
                "Let a proxy on this machine add it.",
            )
        self.url = url.rstrip("/")

    def window_ending_now(self, length_s: int, *, steps: int) -> Window:
        """A window that ends now, by Prometheus' clock.

        Args:
            length_s: Its length in s.
            steps: About so many samples of each series.

        Raises:
            SenteiError: Prometheus cannot be asked, or answers something else.
        """
        data = self._query("time()", None)
        found = check_document(data, f"{self.url}'s answer", _Scalar, hint=_IS_IT)
        if not (now := _finite([found.result])):
            raise SenteiError(f"{self.url} does not know what time it is.", _IS_IT)
        return Window(end_s=now[0][0], length_s=length_s, step_s=max(1, round(length_s / steps)))

    def samples(self, names: Sequence[str], labels: Mapping[str, str], window: Window) -> list[Series]:
        """All series that have one of some names and all of some labels.

        Args:
            names: Of metrics; regular expressions.
            labels: Names and values.
            window: See there.

        Raises:
            SenteiError: See :meth:`window_ending_now`.
        """
        matchers = [f"__name__=~{_quoted('|'.join(names))}", *(f"{key}={_quoted(labels[key])}" for key in labels)]
        data = self._query(f"{{{','.join(matchers)}}}[{window.length_s}s:{window.step_s}s]", window.end_s)
        found = check_document(data, f"{self.url}'s answer", _Matrix, hint=_IS_IT)
        return [Series(labels=each.metric, samples=_finite(each.values)) for each in found.result]

    def _query(self, query: str, time_s: float | None) -> object:
        fields = {"query": query} | ({} if time_s is None else {"time": f"{time_s:.3f}"})
        content = self._get(f"{self.url}/api/v1/query?{urllib.parse.urlencode(fields)}")
        answer = parse_json(content, f"What {self.url} answers", hint=_IS_IT)
        if not isinstance(answer, dict) or answer.get("status") != "success":
            raise SenteiError(f"{self.url} does not answer as a Prometheus does.", _IS_IT)
        if answer.get("warnings"):
            raise SenteiError(f"{self.url} says that its answer may be incomplete ({shown(answer['warnings'])}).")
        return answer.get("data")

    def _get(self, url: str) -> bytes:
        try:
            content = ask(url, timeout_s=_TIMEOUT_S, most_bytes=_MOST_BYTES)
        except RefusedError as error:
            raise SenteiError(
                f"{self.url} answers {error.status} ({_said(error.content) or error}).", _IS_IT
            ) from error
        except UnreachableError as error:
            raise SenteiError(
                f"Prometheus cannot be asked at {self.url} ({error}).", "Name it with --prometheus URL."
            ) from error
        if len(content) > _MOST_BYTES:
            raise SenteiError(
                f"{self.url} answers with more than {_MOST_BYTES:,} bytes.",
                "Choose labels that fewer servers have.",
            )
        return content


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


_Sample = Annotated[list[Any], Field(min_length=2, max_length=2)]


class _Scalar(_Part):
    resultType: Literal["scalar"]
    result: _Sample


class _OneSeries(_Part):
    metric: dict[str, str]
    values: list[_Sample]


class _Matrix(_Part):
    resultType: Literal["matrix"]
    result: list[_OneSeries]


def _finite(values: Sequence[Sequence[Any]]) -> tuple[tuple[float, float], ...]:
    """Times and values; what is no number is left out, as Prometheus' NaN is."""
    found = []
    for time_s, text in values:
        try:
            sample = float(time_s), float(text)
        except (TypeError, ValueError, OverflowError) as error:
            raise SenteiError(f"Prometheus answers with {text!r} where a sample should be.", _IS_IT) from error
        if all(map(math.isfinite, sample)):
            found.append(sample)
    return tuple(sorted(found))


def _quoted(text: str) -> str:
    """A string of PromQL, whose escapes are Go's."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in escaped) + '"'


def _said(content: bytes) -> str:
    """The error that a Prometheus states."""
    try:
        answer = parse_json(content, "")
    except SenteiError:
        return ""
    return shown(answer["error"]) if isinstance(answer, dict) and "error" in answer else ""
