"""A/B benchmark: original and pruned, alternating, the same prompts and lengths; writes ``results.json``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from serving.benchmark.environment import library_versions, machine
from serving.benchmark.goodput import Probe, find_highest_rate
from serving.benchmark.journal import RESULTS_FILE, Journal, open_journal
from serving.benchmark.results import assemble_results, describe
from serving.benchmark.results_document import ResultsDocument
from serving.benchmark.sessions.local import LocalSession
from serving.benchmark.sessions.offline import UNDEFINED, OfflineSession
from serving.benchmark.sessions.server import ServerSession, check_urls
from serving.benchmark.sessions.vllm_client import STALL_TIMEOUT_S
from serving.benchmark.sessions.worker_process import EngineFailedError
from serving.benchmark.statistics import DEFAULT_PRIMARY, SIDES, check_primary, check_statistics
from serving.benchmark.table import as_csv, as_markdown
from serving.benchmark.workload import SERVERS, Slo, Workload, prompts_at_rate
from serving.forecast.model_facts import ModelFacts, checkpoint_facts, onnx_facts, weights_sha256
from serving.onnx_export.files import is_onnx_export, read_settings
from toolchain.devices import parse_device
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.outputs import write_text, writes_directory

MIN_REPEATS = 3
_DTYPES = ("float32", "bfloat16", "float16")
_ONNX, _VLLM = ("onnxruntime_genai", "onnxruntime-genai", "onnx"), ("vllm", "vllm", "vllm")
# vLLM's own client drives the ONNX server too.
_LIBRARIES = {"onnx": (_ONNX,), "onnx-server": (_ONNX, _VLLM), "vllm": (_VLLM,), "vllm-offline": (_VLLM,)}
_MIN_PROBE_PROMPTS, _MAX_PROBE_PROMPTS = 20, 3000
# Between the seeds of one repeat's loads: random prompts begin alike under one seed, and a running server may cache
# prefixes. More than there are repeats; a thousand loads stay below the warm-up's seed.
_SEEDS_A_LOAD = 1000

Engine = Literal["transformers", "onnx", "onnx-server", "vllm", "vllm-offline"]


class Session(Protocol):
    """Both models behind an engine; see :class:`serving.benchmark.sessions.server.ServerSession`."""

    both_up: bool
    told: dict[str, dict[str, Any]]

    def measure(
        self, side: str, repeat: int, workload: Workload, *, name: str, slo: Slo | None = None
    ) -> dict[str, Any]:
        """Asks one model one load."""
        ...

    def drop(self, side: str) -> None:
        """Stops a side's process; the next measurement starts another."""
        ...

    def close(self) -> None:
        """Stops everything."""
        ...


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One measurement of one model. The load after the last workload is the search for the highest rate."""

    repeat: int
    load: int
    side: str

    @property
    def key(self) -> tuple[int, int, str]:
        """As the journal has it."""
        return self.repeat, self.load, self.side


@writes_directory
def benchmark(
    original: Path,
    pruned: Path | None,
    *,
    engine: Engine,
    out: Path,
    workloads: Sequence[Workload],
    slo: Slo | None = None,
    repeats: int = 5,
    primary: str = DEFAULT_PRIMARY,
    device: str = "auto",
    dtype: str | None = None,
    engine_options: Sequence[str] = (),
    urls: Sequence[str] = (),
    api_key: str | None = None,
    price_per_hour: float | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    force: bool = False,
    resume: bool = False,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measures two finished directories against each other and writes ``out/results.json`` with the logs beside it.

    Args:
        original: Checkpoint, or ONNX export for engine ``onnx``.
        pruned: The same kind of directory; ``None`` measures one running server alone.
        engine: What runs both.
        out: Written whole or not at all; until then, what is measured is kept in ``<out>.unfinished``.
        workloads: See :func:`serving.benchmark.workload.make_workloads`. The verdict is about the first.
        slo: If given, the highest request rate that meets these limits is searched for too; vLLM alone.
        repeats: How often both are measured.
        primary: The metric that decides; the others are marked as exploratory.
        device: ``auto``, ``cpu`` or ``cuda``, of Transformers and ONNX; ``auto`` is an ONNX export's own. Servers and
            vLLM have theirs.
        dtype: Computed in; by default the checkpoint's own. An ONNX export has its precision built in.
        engine_options: Options for ``vllm serve``, for both models.
        urls: Servers that run already, the original's and then the pruned model's; vLLM alone.
        api_key: What these servers ask for.
        price_per_hour: Of the machine, in any currency; gives the cost of a million output tokens.
        stall_timeout_s: How long an engine may go without a token before it counts as hung; without a server, each
            2048 tokens of a batch's prompts have as long.
        force: Replace what is in ``out``.
        resume: Go on with what is in ``<out>.unfinished``.
        on_progress: Told one line at a time.

    Returns:
        What ``results.json`` holds.

    Raises:
        SenteiError: Bad directories or settings, or a process that died twice in one measurement; what was measured
            until then is kept for ``resume``.
        MissingDependencyError: The engine or scipy is not installed.
    """
    if not workloads:
        raise SenteiError("There is nothing to measure: no load is given.")
    undefined = UNDEFINED if engine == "vllm-offline" else frozenset()
    check_primary(primary, output_len=workloads[0].output_len, undefined=undefined)
    directories = {"original": original} if pruned is None else {"original": original, "pruned": pruned}
    _check_settings(engine, repeats, slo=slo, urls=urls, num_models=len(directories))
    _check_engine_settings(engine, device, dtype, engine_options, urls=urls)
    if not engine.startswith("onnx"):
        for path in directories.values():
            if is_onnx_export(path):
                raise SenteiError(f"{path} is an ONNX export.", "Use --engine onnx or onnx-server, or its checkpoint.")
    facts = {side: onnx_facts(path) if engine.startswith("onnx") else checkpoint_facts(path, dtype)
             for side, path in directories.items()}  # fmt: skip
    _check_comparable(facts, workloads)
    if engine == "onnx-server" or (engine == "onnx" and device == "auto"):
        _check_one_device(directories)
    check_statistics()
    options = {
        "device": device, "dtype": dtype, "repeats": repeats, "engine_options": list(engine_options),
        "urls": list(urls), "primary": primary, "price_per_hour": price_per_hour,
    }  # fmt: skip
    hashes = {side: weights_sha256(path) for side, path in directories.items()}
    settings = {
        "engine": engine, "weights_sha256": hashes, "versions": library_versions(), "machine": machine(), **options,
        "directories": {side: str(path.resolve()) for side, path in directories.items()},
        "workloads": [describe(each) for each in workloads], "slo": slo and slo.limits
    }  # fmt: skip
    with open_journal(out, settings, force=force, resume=resume, inputs=tuple(directories.values())) as journal:
        session: Session
        if engine in SERVERS:
            session = ServerSession(
                directories, workloads, journal.directory, dtype=dtype, engine_options=engine_options,
                urls=dict(zip(directories, urls, strict=True)) if urls else None, api_key=api_key,
                stall_timeout_s=stall_timeout_s,
                onnx_context=min(each.max_len for each in facts.values()) if engine == "onnx-server" else None,
                searches_rate=slo is not None,
            )  # fmt: skip
        elif engine == "vllm-offline":
            session = OfflineSession(
                directories, journal.directory, dtype=dtype, engine_options=engine_options,
                stall_timeout_s=stall_timeout_s,
            )  # fmt: skip
        else:
            session = LocalSession(
                engine, directories, facts, workloads, journal.directory, device=device, dtype=dtype,
                stall_timeout_s=stall_timeout_s,
            )  # fmt: skip
        try:
            for visit in schedule(
                repeats, len(workloads) + bool(slo), sides=tuple(directories), both_up=session.both_up
            ):
                if not journal.get(visit.key):
                    _measure(session, visit, workloads, slo, journal, primary, repeats, on_progress)
        finally:
            session.close()
        results = assemble_results(
            journal, engine=engine, directories=directories, facts=facts, hashes=hashes, workloads=workloads,
            slo=slo, repeats=repeats, primary=primary, options=options,
        )  # fmt: skip
        write_text(journal.directory / "results.md", as_markdown(results))
        write_text(journal.directory / "results.csv", as_csv(results))
        document = ResultsDocument.model_validate(results)
        write_text(journal.directory / RESULTS_FILE, document.to_json(indent=1, ensure_ascii=False))
    return results


def schedule(repeats: int, num_loads: int, *, both_up: bool, sides: Sequence[str] = SIDES) -> Iterator[Visit]:
    """A B, B A, A B ...: what drifts meets both alike. A server that is up alone takes all loads in a row."""
    for repeat in range(repeats):
        order = sides if repeat % 2 == 0 else sides[::-1]
        if both_up:
            yield from (Visit(repeat=repeat, load=load, side=side) for load in range(num_loads) for side in order)
        else:
            yield from (Visit(repeat=repeat, load=load, side=side) for side in order for load in range(num_loads))


def _measure(
    session: Session,
    visit: Visit,
    workloads: Sequence[Workload],
    slo: Slo | None,
    journal: Journal,
    primary: str,
    repeats: int,
    on_progress: Callable[[str], None],
) -> None:
    """One measurement, with a second attempt on a fresh process; a failed attempt is recorded, never dropped."""
    where = f"repeat {visit.repeat + 1} of {repeats}: {visit.side}"
    for attempt in (1, 2):
        try:
            if visit.load < len(workloads):
                workload = workloads[visit.load]
                name = f"{visit.side}-{visit.repeat}" + (f"-load{visit.load}" if len(workloads) > 1 else "")
                load = _with_own_seed(workload, visit.load)
                measured = session.measure(visit.side, visit.repeat, load, name=name)
                said = f"{workload.label}: {primary} {_shown(measured[primary])}"
            else:
                assert slo is not None
                measured = _search_rate(session, visit, workloads[0], slo)
                said = f"meets the limits up to {measured['max_request_rate']:.3g} requests/s"
            break
        except EngineFailedError as error:
            lost = workloads[min(visit.load, len(workloads) - 1)].num_prompts
            journal.record_failure(visit.key, num_requests=lost, error=error.message)
            session.drop(visit.side)
            if attempt == 2:
                raise SenteiError(
                    f"{where}: failed twice. {error.message}\n",
                    "What was measured is kept: the same command with --resume goes on." if len(journal) else "",
                ) from error
            on_progress(f"{where} failed, and is tried once more: {error.message}")
    journal.record(visit.key, measured, session.told[visit.side])
    on_progress(f"{where}, {said}")


def _search_rate(session: Session, visit: Visit, workload: Workload, slo: Slo) -> dict[str, Any]:
    loads, failed = count(visit.load), 0

    def measure(name: str, num_prompts: int, *, concurrency: int | None = None, rate: float | None = None) -> Probe:
        nonlocal failed
        load = replace(workload, concurrency=concurrency, request_rate=rate, num_prompts=num_prompts)
        measured = session.measure(
            visit.side, visit.repeat, _with_own_seed(load, next(loads)),
            name=f"{visit.side}-{visit.repeat}-slo-{name}", slo=slo,
        )  # fmt: skip
        failed += measured["failed"]
        return Probe(
            met=measured["request_goodput"] * measured["duration"] / num_prompts,
            request_goodput=measured["request_goodput"],
            request_throughput=measured["request_throughput"],
        )

    alone = measure("alone", _MIN_PROBE_PROMPTS, concurrency=1)
    capacity = measure("capacity", max(workload.num_prompts, _MIN_PROBE_PROMPTS)).request_throughput
    found = find_highest_rate(
        capacity,
        lambda rate: measure(f"{rate:.4g}", min(prompts_at_rate(rate), _MAX_PROBE_PROMPTS), rate=rate),
        alone=alone,
    )
    # Requests that failed at a rate missed their objectives there: they are counted, and do not void the search.
    return {**found, "capacity": capacity, "requests_failed": failed, "failed": 0}


def _with_own_seed(workload: Workload, load: int) -> Workload:
    return replace(workload, seed=workload.seed + _SEEDS_A_LOAD * load)


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


def _check_settings(
    engine: str,
    repeats: int,
    *,
    slo: Slo | None,
    urls: Sequence[str],
    num_models: int,
) -> None:
    if engine not in get_args(Engine):
        raise SenteiError(f"Engine {engine!r} is not known.", f"Choose one of {', '.join(get_args(Engine))}.")
    if repeats < MIN_REPEATS:
        raise SenteiError(
            f"{repeats} repeats cannot give an interval worth printing.", f"Use at least {MIN_REPEATS}, better 5."
        )
    if engine not in SERVERS and (urls or slo):
        raise SenteiError(f"Engine {engine} takes no --url and no --slo.", f"They are for {' and '.join(SERVERS)}.")
    if urls:
        check_urls(urls, num_models)
    elif num_models == 1:
        raise SenteiError(
            "There is nothing to compare with.", "Give the pruned model too, or one running server's --url."
        )


def _check_engine_settings(
    engine: str, device: str, dtype: str | None, engine_options: Sequence[str], *, urls: Sequence[str]
) -> None:
    parse_device(device)
    is_onnx, is_local = engine.startswith("onnx"), engine in ("transformers", "onnx")
    if dtype is not None and (dtype not in _DTYPES or is_onnx):
        allowed = "leave it out: an ONNX export has its precision built in" if is_onnx else ", ".join(_DTYPES)
        raise SenteiError(f"dtype {dtype!r} is not possible with engine {engine}.", f"Allowed: {allowed}.")
    if device != "auto" and not is_local:
        owner = "its export" if is_onnx else "the vLLM that is installed"
        raise SenteiError(f"Engine {engine} takes no --device: {owner} decides.", "Leave it out.")
    if engine_options and is_local:
        raise SenteiError(f"Engine {engine} takes no engine options.", "They are for vLLM and for servers.")
    if engine_options and urls:
        raise SenteiError("Engine options are for servers that sentei starts; with --url it starts none.")
    if not is_onnx and any(option.split("=")[0] == "--dtype" for option in engine_options):
        raise SenteiError("The engine option --dtype would hide the precision from the results.", "Use --dtype.")
    if any(option.split("=")[0].replace("_", "-") == "--api-key" for option in engine_options):
        raise SenteiError("--api-key would be written into the results.", "Set VLLM_API_KEY: both sides take it.")
    for library in _LIBRARIES.get(engine, ()):
        _check_library(*library)


def _check_library(module: str, library: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise MissingDependencyError(library, extra)


def _check_one_device(exports: Mapping[str, Path]) -> None:
    devices = {side: read_settings(path).device for side, path in exports.items()}
    if len(set(devices.values())) > 1:
        raise SenteiError(
            f"The original is exported for {devices['original']} and the pruned model for {devices['pruned']}.",
            "Export both alike.",
        )


def _check_comparable(facts: Mapping[str, ModelFacts], workloads: Sequence[Workload]) -> None:
    if len({each.precision for each in facts.values()}) > 1:
        raise SenteiError(
            f"The original is {facts['original'].precision} and the pruned model {facts['pruned'].precision}: what "
            "comes of pruning could not be told from what comes of precision.",
            "Export both alike, or give a dtype.",
        )
    sizes = {side: each.weight_bytes for side, each in facts.items()}
    if sizes["original"] < sizes.get("pruned", 0):
        raise SenteiError(
            f"The original has {sizes['original']:,} bytes of weights and the pruned model {sizes['pruned']:,}.",
            "Are they swapped? The original comes first.",
        )
    needed = max(each.longest for each in workloads)
    for side, each in facts.items():
        if needed > each.max_len:
            raise SenteiError(
                f"{needed} tokens, input and output, do not fit the {side} model, which takes {each.max_len}.",
                "Shorten one of them.",
            )
