"""``vllm bench serve``, watched: a server that hangs or dies ends the measurement, and nothing is left running."""

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.parse
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from serving.benchmark.sessions.vllm_client_process import Client, ClientRun
from serving.benchmark.sessions.worker_process import EngineFailedError
from serving.benchmark.settings import STALL_TIMEOUT_S
from serving.child_process import child_process
from serving.server.process import is_healthy, is_loopback, key_for, open_url, tail
from serving.server.vllm.server import launcher_command, launcher_environment
from toolchain.errors import SenteiError

_POLL_S, _PROGRESS_S = 0.25, 5.0
_TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_REQUEST_ERROR = re.compile(r"^Error \d+: (.+)$", re.MULTILINE)


def bench_serve(
    base_url: str,
    model_dir: Path,
    *,
    options: Sequence[str],
    result_file: Path,
    api_key: str | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    client: Client | None = None,
) -> dict[str, Any]:
    """Runs ``vllm bench serve`` against a running server.

    Args:
        base_url: Of the server.
        model_dir: The directory it serves; its tokenizer makes the prompts.
        options: vLLM's own, such as ``--dataset-name random --num-prompts 8``.
        result_file: Where vLLM writes its result; it is left as it is.
        api_key: What the server asks for.
        stall_timeout_s: How long the server may go without a token in or out, by its own counters; one that answers
            and has no such counters is not judged.
        client: What runs the command; by default a process of its own.

    Returns:
        vLLM's own result, with two of ours beside it: ``first_error`` (the first failed request's, or ``None``) and
        ``client_cpu_cores`` (processor seconds of the client a second of the load; ``None`` off Linux).

    Raises:
        EngineFailedError: The server hung, died, or failed every request.
        SenteiError: The client itself failed; the message holds the end of what it wrote.
    """
    served = served_model_name(base_url, api_key)
    arguments = _arguments(base_url, model_dir, served, result_file, options)
    environment = _client_environment(base_url, api_key)
    log = result_file.with_suffix(".log")
    result_file.unlink(missing_ok=True)
    started = (
        client.running(arguments, environment, log)
        if client
        else child_process(launcher_command(*arguments), environment, log)
    )
    with started as process:
        samples = _watch(process, base_url, api_key, stall_timeout_s)
    said = log.read_text(encoding="utf-8", errors="replace")
    result = _read_result(result_file)
    if result is None or process.returncode != 0:
        if not is_healthy(base_url, api_key):
            raise EngineFailedError(f"The server at {base_url} no longer answers.")
        raise SenteiError(f"vllm bench serve failed (exit code {process.returncode}):\n{tail(said)}")
    first_error = next(iter(_REQUEST_ERROR.findall(said)), None)
    if result["completed"] < result["num_prompts"] and not is_healthy(base_url, api_key):
        raise EngineFailedError(f"The server at {base_url} no longer answers ({first_error or 'no error was told'}).")
    if result["completed"] == 0:
        raise EngineFailedError(
            f"Every one of {result['num_prompts']} requests failed: {first_error or 'no error was told'}."
        )
    log.unlink()
    return {**result, "first_error": first_error, "client_cpu_cores": _busy_cores(samples, result["duration"])}


def _arguments(base_url: str, model_dir: Path, served: str, result_file: Path, options: Sequence[str]) -> list[str]:
    return [
        "bench", "serve",
        "--base-url", base_url,
        "--model", str(model_dir.resolve()),
        "--served-model-name", served,
        "--save-result",
        "--result-dir", str(result_file.resolve().parent),
        "--result-filename", result_file.name,
        "--disable-tqdm",
        *options,
    ]  # fmt: skip


def served_model_name(base_url: str, api_key: str | None = None) -> str:
    """The first model that a server says it serves.

    Raises:
        SenteiError: Nothing answers there, or it asks for another key.
    """
    try:
        with open_url(f"{base_url}/v1/models", api_key) as response:
            return json.load(response)["data"][0]["id"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            given = "The key given" if api_key else "A request without a key"
            raise SenteiError(
                f"{given} is refused by the server at {base_url} ({error}).",
                "Give --api-key-env the name of the environment variable that holds its key.",
            ) from error
        raise SenteiError(f"No vLLM server answers at {base_url} ({error}).") from error
    except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        raise SenteiError(f"No vLLM server answers at {base_url} ({error}).") from error


def _client_environment(base_url: str, api_key: str | None) -> dict[str, str]:
    """What vLLM's client starts with: it takes its key from there, and a proxy too."""
    environment = launcher_environment()
    environment.pop("OPENAI_API_KEY", None)
    if key := key_for(base_url, api_key):
        environment["OPENAI_API_KEY"] = key
    if is_loopback(base_url):
        direct = environment.get("no_proxy") or environment.get("NO_PROXY")
        direct = ",".join(filter(None, [direct, urllib.parse.urlsplit(base_url).hostname]))
        environment |= {"no_proxy": direct, "NO_PROXY": direct}
    return environment


def _watch(
    process: subprocess.Popen[bytes] | ClientRun, base_url: str, api_key: str | None, stall_timeout_s: float
) -> list[tuple[float, float]]:
    """Waits for the client; returns its ``(time, processor seconds)`` samples."""
    samples: list[tuple[float, float]] = []
    tokens: float | None = None
    moved_s = asked_s = time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if (used := _processor_seconds(process.pid)) is not None:
            samples.append((now, used))
        if now - asked_s >= min(_PROGRESS_S, stall_timeout_s / 2):
            asked_s = now
            with suppress(OSError, HTTPException):  # no answer is no progress
                before, tokens = tokens, _tokens_so_far(base_url, api_key)
                if tokens is None or tokens != before:
                    moved_s = now
        if now - moved_s > stall_timeout_s:
            raise EngineFailedError(f"The server at {base_url} hung: no token in or out for {stall_timeout_s:.0f} s.")
        time.sleep(_POLL_S)
    return samples


def _tokens_so_far(base_url: str, api_key: str | None) -> float | None:
    """Tokens in and out since the server started; ``None`` where it answers and does not tell."""
    try:
        with open_url(f"{base_url}/metrics", api_key) as response:
            counts = _TOKENS.findall(response.read().decode("utf-8", errors="replace"))
    except urllib.error.HTTPError:
        return None
    return sum(map(float, counts)) if counts else None


def _processor_seconds(pid: int) -> float | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None


def _busy_cores(samples: Sequence[tuple[float, float]], duration_s: float) -> float | None:
    """Processor seconds a second over the load, which ends just before the client does."""
    if not samples:
        return None
    end_s, used = samples[-1]
    before = [sample for sample in samples if sample[0] <= end_s - duration_s]
    start_s, used_before = before[-1] if before else samples[0]
    return (used - used_before) / (end_s - start_s) if end_s > start_s else None


def _read_result(file: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content
