"""Models of given shapes, written with random weights and measured in turn, by the code that a benchmark runs."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from serving.benchmark.environment import library_versions, machine
from serving.benchmark.journal import Journal
from serving.benchmark.run import Session, measure_all, new_session
from serving.benchmark.settings import MIN_REPEATS, BenchmarkSettings, check_settings
from serving.benchmark.side import Side, open_side
from serving.benchmark.workload import make_workloads
from serving.profile.random_model import write_random_model
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint
from toolchain.costs.document import CostsDocument, Load, Served
from toolchain.errors import SenteiError
from toolchain.json_files import first_difference
from toolchain.model.context_length import check_context
from toolchain.outputs import new_directory

# What was measured, by quantity: one number a repeat, and of bytes one in all.
Measured = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where models of one shape are measured, and how.

    Attributes:
        checkpoint: The unpruned model; none of its weights is read.
        settings: With one workload, as a benchmark takes them.
        precision: Of ONNX exports; ``None`` for engines that run checkpoints.
        export: Makes an ONNX export of a checkpoint, in that precision; for engines that read these.
        open_session: What asks the engine.
        on_progress: Told one line at a time.
    """

    checkpoint: Checkpoint
    settings: BenchmarkSettings
    precision: str | None = None
    export: Callable[[Path, Path], object] | None = None
    open_session: Callable[[BenchmarkSettings, Mapping[str, Side], Path], Session] = new_session
    on_progress: Callable[[str], None] = lambda message: None

    @property
    def load(self) -> Load:
        """What each model is asked."""
        [workload] = self.settings.workloads
        assert workload.concurrency is not None, "a profile's load has no request rate"
        return Load(
            input_len=workload.input_len,
            output_len=workload.output_len,
            concurrency=workload.concurrency,
            num_prompts=workload.num_prompts,
        )

    @property
    def served(self) -> Served:
        """What a measurement here is true of."""
        settings = self.settings
        return Served.model_validate({
            "engine": settings.engine, "precision": self.precision, "dtype": settings.dtype, "device": settings.device,
            "engine_options": list(settings.engine_options), "machine": machine(), "versions": library_versions(),
        })  # fmt: skip

    def check(self) -> None:
        """Refuses what cannot be measured, before anything is written.

        Raises:
            SenteiError: Settings that do not go together, or a load that the model's context does not hold.
            MissingDependencyError: The engine is not installed.
        """
        # The errors of costs come from more models than unknowns, so that one repeat is enough.
        check_settings(replace(self.settings, repeats=max(MIN_REPEATS, self.settings.repeats)), num_models=2)
        model, [workload] = self.checkpoint, self.settings.workloads
        asked = f"{workload.input_len} tokens in and {workload.output_len} out"
        check_context(model.directory, model.config, workload.longest, asked=asked, hint="Shorten one of them.")


def bench_as_profiled(
    costs: CostsDocument,
    checkpoint: Checkpoint,
    *,
    export: Callable[[Path, Path], object] | None = None,
    on_progress: Callable[[str], None] = lambda message: None,
) -> Bench:
    """What measures another shape of a model as its costs were measured, often enough for an interval.

    Args:
        costs: What was read from ``costs.json``.
        checkpoint: The unpruned model.
        export: See :class:`Bench`.
        on_progress: Likewise.

    Raises:
        SenteiError: This machine, or what is installed here, is not what the costs were measured with.
        MissingDependencyError: The engine is not installed.
    """
    served, load = costs.served, costs.load
    workloads = make_workloads(
        engine=served.engine, input_len=load.input_len, output_len=load.output_len, concurrency=[load.concurrency],
        num_prompts=load.num_prompts,
    )  # fmt: skip
    settings = BenchmarkSettings(
        engine=served.engine, workloads=workloads, repeats=max(MIN_REPEATS, costs.repeats), device=served.device,
        dtype=served.dtype, engine_options=tuple(served.engine_options),
    )  # fmt: skip
    bench = Bench(
        checkpoint=checkpoint, settings=settings, precision=served.precision, export=export, on_progress=on_progress
    )
    bench.check()
    if found := first_difference(served.model_dump(mode="json"), bench.served.model_dump(mode="json")):
        field, then, here = found
        raise SenteiError(
            f"These costs were measured with another {field}: {then} then, {here} here.",
            "Profile again where the model will be served, and prune there.",
        )
    return bench


def measure_models(
    bench: Bench,
    layouts: Mapping[str, Sequence[LayerLayout]],
    directory: Path,
    is_too_rough: Callable[[Mapping[str, Measured]], bool] = lambda found: False,
) -> dict[str, Measured]:
    """Measures models in turn, and goes on with what is in ``directory``.

    Args:
        bench: Where and how.
        layouts: The models' layers by name. All models are on disk at once.
        directory: Keeps measurements and logs; made if need be. The models in it are deleted at the end.
        is_too_rough: Whether what was measured is to be measured as often again.

    Returns:
        By name and quantity.

    Raises:
        SenteiError: A model failed twice, or some of its requests did.
    """
    directory.mkdir(parents=True, exist_ok=True)
    models = directory / "models"
    sides = {name: _side(bench, name, layout, models / name) for name, layout in layouts.items()}
    journal = Journal(directory)

    def measured(repeats: int) -> dict[str, Measured]:
        settings = replace(bench.settings, repeats=repeats)
        measure_all(settings, sides, journal, bench.on_progress, open_session=bench.open_session)
        return {
            name: _measured(side, [journal.get((repeat, 0, name)) for repeat in range(repeats)])
            for name, side in sides.items()
        }

    found = measured(bench.settings.repeats)
    if is_too_rough(found):
        found = measured(2 * bench.settings.repeats)
    shutil.rmtree(models)
    return found


def _side(bench: Bench, name: str, layout: Sequence[LayerLayout], place: Path) -> Side:
    """The model of this shape, written unless it is there already."""
    settings = bench.settings
    if not place.exists():
        bench.on_progress(f"writing {name}")
        dtype = getattr(torch, settings.dtype) if settings.dtype else bench.checkpoint.dtype
        place.parent.mkdir(exist_ok=True)
        weights = place.with_name(f"{name}.weights") if bench.export else place
        shutil.rmtree(weights, ignore_errors=True)
        with new_directory(weights, force=True) as partial:
            write_random_model(bench.checkpoint, layout, partial, dtype=dtype)
        if bench.export:
            bench.export(weights, place)
            shutil.rmtree(weights)
    return open_side(name, place, settings)


def _measured(side: Side, entries: Sequence[dict[str, Any] | None]) -> Measured:
    runs = [entry["metrics"] for entry in entries if entry is not None]
    if failed := sum(run["failed"] for run in runs):
        raise SenteiError(f"{failed} requests to the model {side.name} failed: its times say nothing.", "See the logs.")
    times = {
        "ttft_ms": [run["mean_ttft_ms"] for run in runs],
        "tpot_ms": [run["mean_tpot_ms"] for run in runs],
        "ms_per_output_token": [1000 / run["output_throughput"] for run in runs],
    }
    # With one output token there is no time between two.
    defined = {name: values for name, values in times.items() if None not in values}
    facts = side.facts
    return {**defined, "weight_bytes": [facts.weight_bytes], "kv_bytes_per_token": [facts.kv_bytes_per_token]}
