"""A/B benchmark: original and pruned, alternating, the same prompts and lengths; writes ``results.json``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from serving.benchmark.environment import library_versions, machine
from serving.benchmark.goodput import MIN_PROBE_PROMPTS, alone_prompts, find_highest_rate, read_probe
from serving.benchmark.journal import RESULTS_FILE, Journal, open_journal
from serving.benchmark.ratios import SIDES
from serving.benchmark.results import assemble_results, describe
from serving.benchmark.results_document import ResultsDocument
from serving.benchmark.sessions.local import LocalSession
from serving.benchmark.sessions.offline import OfflineSession
from serving.benchmark.sessions.server import ServerSession
from serving.benchmark.sessions.worker_process import EngineFailedError
from serving.benchmark.settings import BenchmarkSettings, check_settings
from serving.benchmark.side import Side, open_sides
from serving.benchmark.table import as_csv, as_markdown
from serving.benchmark.workload import Slo, Workload
from toolchain.errors import SenteiError
from toolchain.outputs import write_text, writes_directory
from toolchain.significance import check_statistics

# Between the seeds of one repeat's loads: random prompts begin alike under one seed, and a running server may cache
# prefixes. More than there are repeats; a thousand loads stay below the warm-up's seed.
_SEEDS_A_LOAD = 1000


class Session(Protocol):
    """Both models behind an engine; see :class:`serving.benchmark.sessions.server.ServerSession`."""

    both_up: bool

    def measure(
        self, side: Side, repeat: int, workload: Workload, *, name: str, slo: Slo | None = None
    ) -> dict[str, Any]:
        """Asks one model one load. What its engine reports of itself goes into ``side.engine_report``."""
        ...

    def drop(self, side: Side) -> None:
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
    settings: BenchmarkSettings,
    *,
    out: Path,
    force: bool = False,
    resume: bool = False,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measures two finished directories against each other and writes ``out/results.json`` with the logs beside it.

    Args:
        original: Checkpoint, or ONNX export for an engine that runs these.
        pruned: The same kind of directory; ``None`` measures one running server alone.
        settings: How.
        out: Written whole or not at all; until then, what is measured is kept in ``<out>.unfinished``.
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
    check_settings(settings, num_models=1 if pruned is None else 2)
    sides = open_sides(original, pruned, settings)
    check_statistics("demo")
    inputs = tuple(side.directory for side in sides.values())
    with open_journal(out, _conditions(settings, sides), force=force, resume=resume, inputs=inputs) as journal:
        measure_all(settings, sides, journal, on_progress)
        for side in sides.values():
            # A benchmark that was resumed may have started only one of them, or none.
            side.engine_report = journal.engine_report(side.name)
        results = assemble_results(journal, settings, sides)
        write_text(journal.directory / "results.md", as_markdown(results))
        write_text(journal.directory / "results.csv", as_csv(results))
        document = ResultsDocument.model_validate(results)
        write_text(journal.directory / RESULTS_FILE, document.to_json(indent=1, ensure_ascii=False))
    return results


def _conditions(settings: BenchmarkSettings, sides: Mapping[str, Side]) -> dict[str, Any]:
    """Everything that the measurements depend on, as JSON: a benchmark is resumed only where it is the same."""
    return {
        "engine": settings.engine,
        "weights_sha256": {name: side.files_sha256 for name, side in sides.items()},
        "versions": library_versions(),
        "machine": machine(),
        **settings.options,
        "directories": {name: str(side.directory.resolve()) for name, side in sides.items()},
        "workloads": [describe(each) for each in settings.workloads],
        "slo": settings.slo and settings.slo.limits,
        **({"attainment": settings.attainment} if settings.slo else {}),
    }


def new_session(settings: BenchmarkSettings, sides: Mapping[str, Side], out: Path) -> Session:
    """What asks the engine; its logs go to ``out``. Nothing is started yet."""
    if settings.spec.is_server:
        return ServerSession(sides, settings, out)
    if settings.spec.in_worker:
        return LocalSession(sides, settings, out)
    return OfflineSession(sides, settings, out)


def measure_all(
    settings: BenchmarkSettings,
    sides: Mapping[str, Side],
    journal: Journal,
    on_progress: Callable[[str], None],
    *,
    open_session: Callable[[BenchmarkSettings, Mapping[str, Side], Path], Session] = new_session,
) -> None:
    """Makes every measurement that the journal does not have, of any number of models in turn.

    Raises:
        SenteiError: A model failed twice in one measurement, or an option that the engine refuses.
    """
    session = open_session(settings, sides, journal.directory)
    num_loads = len(settings.workloads) + bool(settings.slo)
    try:
        for visit in schedule(settings.repeats, num_loads, sides=tuple(sides), both_up=session.both_up):
            if not journal.get(visit.key):
                _measure(session, visit, sides[visit.side], settings, journal, on_progress)
    finally:
        session.close()


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
    side: Side,
    settings: BenchmarkSettings,
    journal: Journal,
    on_progress: Callable[[str], None],
) -> None:
    """One measurement, with a second attempt on a fresh process; a failed attempt is recorded, never dropped."""
    workloads = settings.workloads
    where = f"repeat {visit.repeat + 1} of {settings.repeats}: {side.name}"
    for attempt in (1, 2):
        try:
            if visit.load < len(workloads):
                workload = workloads[visit.load]
                name = f"{side.name}-{visit.repeat}" + (f"-load{visit.load}" if len(workloads) > 1 else "")
                measured = session.measure(side, visit.repeat, _with_own_seed(workload, visit.load), name=name)
                said = f"{workload.label}: {settings.primary} {_shown(measured[settings.primary])}"
            else:
                measured = _search_rate(session, visit, side, workloads[0], settings)
                said = f"meets the limits up to {measured['max_request_rate']:.3g} requests/s"
            break
        except EngineFailedError as error:
            lost = workloads[min(visit.load, len(workloads) - 1)].num_prompts
            journal.record_failure(visit.key, num_requests=lost, error=error.message)
            session.drop(side)
            if attempt == 2:
                raise SenteiError(
                    f"{where}: failed twice. {error.message}\n",
                    "What was measured is kept: the same command with --resume continues." if len(journal) else "",
                ) from error
            on_progress(f"{where} failed, and is tried once more: {error.message}")
    journal.record(visit.key, measured, side.engine_report)
    on_progress(f"{where}, {said}")


def _search_rate(
    session: Session, visit: Visit, side: Side, workload: Workload, settings: BenchmarkSettings
) -> dict[str, Any]:
    loads, failed = count(visit.load), 0

    def measure(name: str, num_prompts: int, **arrivals: Any) -> dict[str, Any]:
        nonlocal failed
        load = replace(workload, num_prompts=num_prompts, **({"concurrency": None, "request_rate": None} | arrivals))
        number = next(loads)
        measured = session.measure(
            side,
            visit.repeat,
            _with_own_seed(load, number),
            name=f"{side.name}-{visit.repeat}-slo-{number - visit.load}-{name}",
            slo=settings.slo,
        )
        failed += measured["failed"]
        return measured

    alone = measure("alone", alone_prompts(settings.attainment), concurrency=1)
    capacity = measure("capacity", max(workload.num_prompts, MIN_PROBE_PROMPTS))["request_throughput"]
    alone_met = [each.met for each in alone["requests"]]
    found = find_highest_rate(
        capacity,
        lambda rate, num_prompts: read_probe(
            measure(f"{rate:.4g}", num_prompts, request_rate=rate)["requests"], rate=rate
        ),
        alone_met=sum(alone_met) / len(alone_met),
        alone_s=alone["mean_e2el_ms"] / 1000,
        attainment=settings.attainment,
    )
    # Requests that failed at a rate missed their objectives there: they are counted, and do not void the search.
    return {**found, "alone_met": sum(alone_met) / len(alone_met), "capacity": capacity, "requests_failed": failed,
            "failed": 0}  # fmt: skip


def _with_own_seed(workload: Workload, load: int) -> Workload:
    return replace(workload, seed=workload.seed + _SEEDS_A_LOAD * load)


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
