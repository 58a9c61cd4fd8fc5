"""What each repeat asks of each model: lengths, how many requests, how they arrive, and which limits they must meet."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from serving.engines.spec import engine_spec
from toolchain.errors import SenteiError
from toolchain.json_files import read_json_lines

# Added to the seed: a warm-up with a repeat's own prompts would leave them in a prefix cache.
WARMUP_SEED = 1_000_003
_PROMPT_HINT = 'Write {"prompt": "...", "output_tokens": 128}; --output-len stands in for output_tokens.'
_MOST_TOKENS = 2**31
# Prompts of a repeat, which are held in memory.
_MOST_PROMPTS = 1_000_000
_RATE_SECONDS, _RATE_MIN_PROMPTS = 30, 20


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A load that has a name: tokens in and out, and how many requests at a time."""

    input_len: int
    output_len: int
    concurrency: int


PRESETS: Mapping[str, Preset] = {
    "chat": Preset(input_len=512, output_len=256, concurrency=8),
    "rag": Preset(input_len=4096, output_len=512, concurrency=4),
    "batch": Preset(input_len=512, output_len=128, concurrency=64),
    "classify": Preset(input_len=512, output_len=1, concurrency=8),
}


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """One's own prompts, as ``vllm bench serve`` reads them.

    Attributes:
        lines: A JSON object each, with ``prompt`` and ``output_tokens``.
        input_len: Mean tokens of a prompt, rounded, as the original's tokenizer counts.
        output_len: Mean tokens of an answer, rounded.
        longest: Tokens in and out of the longest.
    """

    lines: tuple[str, ...]
    input_len: int
    output_len: int
    longest: int

    @property
    def sha256(self) -> str:
        """Of the lines."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One load.

    Attributes:
        input_len: Tokens of every prompt; the mean, where prompts come from a file.
        output_len: Tokens of every answer, likewise; end-of-sequence is ignored.
        concurrency: Requests in flight: one batch for Transformers and ONNX, ``--max-concurrency`` for vLLM. ``None``
            where only the request rate limits them.
        request_rate: Requests a second, arriving as a Poisson process; ``None`` sends the next as soon as one ends.
        num_prompts: Requests a repeat.
        seed: Of the random token ids the prompts are made of, and of the arrivals; repeat *r* uses ``seed + r`` for
            both models.
        range_ratio: Lengths are drawn evenly from ``(1 - range_ratio)`` to ``(1 + range_ratio)`` times the above.
        prompts: In place of random token ids.
    """

    input_len: int
    output_len: int
    concurrency: int | None
    request_rate: float | None = None
    range_ratio: float = 0.0
    num_prompts: int
    seed: int
    prompts: Prompts | None = None

    @property
    def width(self) -> int:
        """The most requests that can be in flight: a warm-up must be as wide."""
        return min(self.concurrency or self.num_prompts, self.num_prompts)

    @property
    def longest(self) -> int:
        """Tokens in and out of the longest request."""
        if self.prompts:
            return self.prompts.longest
        return sum(math.floor((1 + self.range_ratio) * length) for length in (self.input_len, self.output_len))

    @property
    def label(self) -> str:
        """How hard, in a few words."""
        arrivals = [] if self.request_rate is None else [f"{self.request_rate:g} requests/s"]
        in_flight = [] if self.concurrency is None else [f"{self.concurrency} at a time"]
        return ", ".join(arrivals + in_flight)


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Service-level objectives in milliseconds, of each request; ``None`` is no limit. Names are vLLM's."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set."""
        values = {"ttft": self.ttft, "tpot": self.tpot, "e2el": self.e2el}
        return {name: value for name, value in values.items() if value is not None}


def parse_slo(text: str) -> Slo:
    """Reads ``ttft=500,tpot=50``.

    Raises:
        SenteiError: An unknown name, or no positive number of milliseconds.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            limits[name.strip()] = float(value)
        except ValueError:
            limits[name.strip()] = math.nan
    for name, limit in limits.items():
        if name not in ("ttft", "tpot", "e2el") or not 0 < limit < math.inf:
            raise SenteiError(
                f"--slo {text!r}: {name or 'nothing'} is not a limit in milliseconds.",
                "Write it like ttft=500,tpot=50 (or e2el).",
            )
    return Slo(**limits)


def make_workloads(
    *,
    engine: str,
    input_len: int = 512,
    output_len: int = 128,
    concurrency: Sequence[int] = (1,),
    request_rate: Sequence[float] = (),
    num_prompts: int | None = None,
    range_ratio: float = 0.0,
    prompts: Prompts | None = None,
) -> tuple[Workload, ...]:
    """One workload for each concurrency and each request rate, in that order.

    Args:
        engine: A name of :data:`serving.engines.spec.ENGINES`.
        input_len: Prompt tokens.
        output_len: Tokens generated for every prompt.
        concurrency: Requests in flight.
        request_rate: Requests a second; vLLM alone.
        num_prompts: Requests a repeat; by default one batch of ``concurrency``, four of them for vLLM, and as many as
            arrive in 30 seconds at a request rate.
        range_ratio: See :class:`Workload`; vLLM alone, since the others decode one batch of one length.
        prompts: In place of random token ids, with their own lengths; each is asked once by default. vLLM alone.

    Raises:
        SenteiError: A setting that cannot be.
    """
    spec = engine_spec(engine)
    if not spec.is_server and (request_rate or prompts or range_ratio):
        raise SenteiError(
            f"Request rates, files of prompts and ranges of lengths need a server; engine {engine} has none.",
            "Use vllm.",
        )
    if not 0 <= range_ratio < 1:
        raise SenteiError(f"range_ratio is {range_ratio}; it must be from 0 to below 1.")
    if prompts and range_ratio:
        raise SenteiError("A file of prompts brings its own lengths; range_ratio is for random prompts.")
    if not concurrency and not request_rate:
        raise SenteiError("There is no load: neither a concurrency nor a request rate is given.")
    for name, values in (("concurrency", concurrency), ("request_rate", request_rate)):
        for value in values:
            if not 0 < value < math.inf:
                raise SenteiError(f"{name} is {value}; it must be a number above 0.")
    if prompts:
        input_len, output_len, num_prompts = prompts.input_len, prompts.output_len, num_prompts or len(prompts.lines)
    common: dict[str, Any] = {"input_len": input_len, "output_len": output_len, "seed": 0, "prompts": prompts,
                              "range_ratio": range_ratio}  # fmt: skip
    batches = 1 if spec.in_worker else 4
    workloads = [
        Workload(concurrency=each, num_prompts=num_prompts or batches * each, **common) for each in concurrency
    ]
    workloads += [
        Workload(concurrency=None, request_rate=rate, num_prompts=num_prompts or prompts_at_rate(rate), **common)
        for rate in request_rate
    ]
    for workload in workloads:
        _check(workload)
    return tuple(workloads)


def prompts_at_rate(request_rate: float) -> int:
    """How many requests arrive in 30 seconds, but 20 at least: a Poisson process needs some to look like one."""
    return max(_RATE_MIN_PROMPTS, math.ceil(_RATE_SECONDS * request_rate))


def _check(workload: Workload) -> None:
    for name in ("input_len", "output_len", "num_prompts"):
        if getattr(workload, name) < 1:
            raise SenteiError(f"{name} is {getattr(workload, name)}; it must be at least 1.")
    if workload.num_prompts > _MOST_PROMPTS:
        raise SenteiError(
            f"num_prompts is {workload.num_prompts}, more than {_MOST_PROMPTS}.", "Give fewer, or a lower load."
        )
    if workload.concurrency and workload.num_prompts < workload.concurrency:
        raise SenteiError(
            f"num_prompts is {workload.num_prompts}, fewer than the {workload.concurrency} requests in flight.",
            "Raise num_prompts, or lower concurrency.",
        )


def read_prompts(file: Path, *, output_len: int | None, tokenizer: Path) -> Prompts:
    """Reads one's own prompts: a JSON object a line, with ``prompt`` and, if wanted, ``output_tokens``.

    Args:
        file: The JSONL file.
        output_len: Tokens of every answer; ``None`` takes each line's ``output_tokens``.
        tokenizer: The checkpoint whose tokenizer counts.

    Raises:
        SenteiError: The first line that is not so, or no usable tokenizer.
    """
    prompts = [_read_prompt(where, entry, output_len) for where, entry in read_json_lines(file, hint=_PROMPT_HINT)]
    if not prompts:
        raise SenteiError(f"{file} holds no prompts.")
    from toolchain.model.loading import load_tokenizer

    encode = load_tokenizer(tokenizer)
    lengths = [(len(encode(prompt).input_ids), tokens) for prompt, tokens in prompts]
    return Prompts(
        lines=tuple(json.dumps({"prompt": prompt, "output_tokens": tokens}) for prompt, tokens in prompts),
        input_len=max(1, round(fmean(length for length, _ in lengths))),
        output_len=max(1, round(fmean(tokens for _, tokens in lengths))),
        longest=max(map(sum, lengths)),
    )


def _read_prompt(where: str, entry: Any, output_len: int | None) -> tuple[str, int]:
    try:
        prompt, tokens = entry["prompt"], output_len or entry["output_tokens"]
    except (TypeError, KeyError) as error:
        raise SenteiError(f"{where} is not a prompt ({error}).", _PROMPT_HINT) from error
    if not isinstance(prompt, str) or not prompt or type(tokens) is not int or not 0 < tokens <= _MOST_TOKENS:
        raise SenteiError(f"{where}: prompt must be a text and output_tokens a number above 0.")
    return prompt, tokens
