"""What the ONNX server counts and times, for Prometheus.

Names, labels and buckets are vLLM's (0.32) where the meaning is, so that one dashboard serves both servers. Where a
number of vLLM's has no meaning here (preemption, prefix cache, blocks), it is left out.
"""

import threading
import time
from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.server.onnx.batch_thread import BatchThread
from serving.server.onnx.continuous_batch import OnnxBatch

Ending = Literal["stop", "length", "abort", "error"]

_LABELS = ("model_name", "engine")
_LATENCY_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_BETWEEN_TOKENS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
# Other paths share one label, or a stranger could make as many as there are names.
_HANDLERS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics"})


class ServerMetrics:
    """All numbers of one server.

    Attributes:
        registry: What ``/metrics`` shows.
    """

    def __init__(self, model_name: str, max_model_len: int) -> None:
        """Starts at zero.

        Args:
            model_name: The label of each number.
            max_model_len: The largest bucket of what counts tokens.
        """
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._labels = (model_name, "0")
        self.first_token = self._histogram("time_to_first_token_seconds", "Time to first token.", _FIRST_TOKEN_S)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Time between tokens.", _BETWEEN_TOKENS_S)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between a request's tokens.", _BETWEEN_TOKENS_S
        )
        self.whole = self._histogram("e2e_request_latency_seconds", "Time from arrival to last token.", _LATENCY_S)
        self.queued = self._histogram("request_queue_time_seconds", "Time until a row was free.", _LATENCY_S)
        self.prefill = self._histogram("request_prefill_time_seconds", "From row to first token.", _LATENCY_S)
        self.decode = self._histogram("request_decode_time_seconds", "From first to last token.", _LATENCY_S)
        self.inference = self._histogram("request_inference_time_seconds", "From row to last token.", _LATENCY_S)
        sizes = _one_two_five(max_model_len)
        self.prompt_size = self._histogram("request_prompt_tokens", "Tokens of the prompt.", sizes)
        self.answer_size = self._histogram("request_generation_tokens", "Tokens of the answer.", sizes)
        self.max_tokens = self._histogram("request_params_max_tokens", "The max_tokens asked for.", sizes)
        success = Counter(
            "vllm:request_success", "Requests by how they ended.", (*_LABELS, "finished_reason"), registry=self.registry
        )
        self.ended = {reason: success.labels(*self._labels, reason) for reason in ("stop", "length", "abort", "error")}
        self.refused = Counter(
            "vllm:admission_rejections", "Refused since the queue was full.", ("model_name", "reason"),
            registry=self.registry,
        ).labels(model_name, "max_num_queued_reqs")  # fmt: skip
        self._http = Counter("http_requests", "Answers.", ("method", "status", "handler"), registry=self.registry)

    def watch(self, batch: OnnxBatch, thread: BatchThread) -> None:
        """Shows what a batch and its thread count themselves."""
        self.registry.register(_BatchCollector(self._labels, batch, thread))

    def answered(self, method: str, path: str, status: int) -> None:
        """Counts an HTTP answer; as in vLLM, ``status`` is counted as 2xx and so on."""
        known = method if method in ("GET", "POST", "HEAD") else "other"
        self._http.labels(known, f"{status // 100}xx", path if path in _HANDLERS else "none").inc()

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"vllm:{name}", meaning, _LABELS, buckets=buckets, registry=self.registry)
        return metric.labels(*self._labels)


class RequestTimes:
    """Times of one request on its way through the batch."""

    def __init__(self, metrics: ServerMetrics, *, prompt_tokens: int, max_tokens: int) -> None:
        """The request has arrived."""
        self._metrics, self._prompt_tokens, self._max_tokens = metrics, prompt_tokens, max_tokens
        self._arrived = time.monotonic()
        self._joined = self._first = self._last = 0.0
        self._num_tokens = 0
        self._turn = threading.Lock()
        self._has_ended = False

    def joined(self) -> None:
        """It has been given a row."""
        self._joined = time.monotonic()

    def token(self) -> None:
        """It has been given a token."""
        now = time.monotonic()
        if self._num_tokens:
            self._metrics.between_tokens.observe(now - self._last)
        else:
            self._first = now
            self._metrics.first_token.observe(now - self._arrived)
        self._last = now
        self._num_tokens += 1

    def ended(self, reason: Ending) -> None:
        """It has ended; only the first reason counts."""
        with self._turn:
            if self._has_ended:
                return
            self._has_ended = True
        metrics, now = self._metrics, time.monotonic()
        metrics.ended[reason].inc()
        if reason in ("abort", "error"):
            return
        metrics.whole.observe(now - self._arrived)
        metrics.queued.observe(self._joined - self._arrived)
        metrics.prefill.observe(self._first - self._joined)
        metrics.inference.observe(self._last - self._joined)
        metrics.decode.observe(self._last - self._first)
        metrics.prompt_size.observe(self._prompt_tokens)
        metrics.answer_size.observe(self._num_tokens)
        metrics.max_tokens.observe(self._max_tokens)
        if self._num_tokens > 1:
            metrics.per_token.observe((self._last - self._first) / (self._num_tokens - 1))


class _BatchCollector(Collector):
    """Numbers that the batch keeps anyway, read when they are asked for."""

    def __init__(self, labels: tuple[str, str], batch: OnnxBatch, thread: BatchThread) -> None:
        self._labels, self._batch, self._thread = labels, batch, thread

    def collect(self) -> Iterator[Metric]:
        """See :class:`prometheus_client.registry.Collector`."""
        batch = self._batch
        for kind, name, meaning, value in (
            (CounterMetricFamily, "prompt_tokens", "Prompt tokens that were run.", batch.prompt_tokens),
            (CounterMetricFamily, "generation_tokens", "Tokens that were given.", batch.generation_tokens),
            (GaugeMetricFamily, "num_requests_running", "Requests that have a row.", batch.num_running),
            (GaugeMetricFamily, "num_requests_waiting", "Requests that wait for a row.", self._thread.num_waiting),
            (GaugeMetricFamily, "kv_cache_usage_perc", "KV cache promised to requests; 1 is all.", batch.kv_usage),
        ):
            family = kind(f"vllm:{name}", meaning, labels=_LABELS)
            family.add_metric(self._labels, value)
            yield family


class CountAnswers:
    """Middleware that counts answers by their status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        """``metrics``: where to count."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(scope["method"], scope["path"], message["status"])
            await send(message)

        await self._app(scope, receive, send_and_count if scope["type"] == "http" else send)


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20 ... up to ``most``."""
    found: list[float] = []
    power = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * power > most:
                return tuple(found)
            found.append(mantissa * power)
        power *= 10
