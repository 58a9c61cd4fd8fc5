"""`costs.json` from beginning to end: models are measured, costs fitted to them and checked by leaving one out."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from serving.profile.measure import Bench, Measured, measure_models
from serving.profile.shapes import Layout, num_layers_measured, shapes_to_measure, widths_measured
from toolchain.checkpoint.directory import model_name
from toolchain.costs.document import (
    TIMES,
    CheckRecord,
    CostsDocument,
    ErrorRecord,
    MeasuredModel,
    PartsRecord,
    ShapedModel,
    config_sha256,
)
from toolchain.costs.parts import PartCosts, fit_parts, tell_apart
from toolchain.errors import SenteiError
from toolchain.outputs import PROFILE, Unfinished, write_text, writes_file

_LEAST_LAYERS, _LEAST_WIDTH = 2, 8


@writes_file
def profile(bench: Bench, out: Path, *, force: bool = False, resume: bool = False) -> CostsDocument:
    """Measures what each part of a model costs, and writes ``costs.json``.

    Args:
        bench: The model, and how it is measured.
        out: The file to write. Until then, what was measured is kept in ``<out>.profile``.
        force: Replace ``out``.
        resume: Go on with what is in ``<out>.profile``.

    Raises:
        SenteiError: A model or a load that cannot be measured; nothing was written. Or a measurement failed twice.
        MissingDependencyError: The engine is not installed.
    """
    bench.check()
    model = _shaped(bench)
    shapes = shapes_to_measure(model.intermediate_size, num_layers_measured(bench.checkpoint))
    identity = {
        "model": model.model_dump(mode="json"),
        "served": bench.served.model_dump(mode="json"),
        "load": bench.load.model_dump(mode="json"),
        "repeats": bench.settings.repeats,
        "layers": num_layers_measured(bench.checkpoint),
        "models": list(shapes),
    }
    work = Unfinished(out, PROFILE, force=force, resume=resume)
    with work.working(identity):
        work.worth_keeping = True  # models on disk, and then each measurement
        measured = measure_models(bench, shapes, work.directory)
        document = costs_document(bench, model, shapes, measured)
        write_text(out, document.to_json(indent=1))
    return document


def _shaped(bench: Bench) -> ShapedModel:
    checkpoint = bench.checkpoint
    if checkpoint.is_pruned:
        raise SenteiError(f"{checkpoint.directory} is pruned already.", "Profile the original.")
    width = checkpoint.layout[0].intermediate_size
    if len(checkpoint.layout) < _LEAST_LAYERS or width < _LEAST_WIDTH:
        raise SenteiError(
            f"{checkpoint.directory} has {len(checkpoint.layout)} layers and FFNs of {width} neurons; costs are told "
            f"apart from {_LEAST_LAYERS} layers and {_LEAST_WIDTH} neurons on."
        )
    return ShapedModel(
        name=model_name(checkpoint.directory),
        model_type=checkpoint.family.model_type,
        config_sha256=config_sha256(checkpoint.config),
        num_hidden_layers=len(checkpoint.layout),
        intermediate_size=width,
    )


def costs_document(
    bench: Bench, model: ShapedModel, shapes: Mapping[str, Layout], measured: Mapping[str, Measured]
) -> CostsDocument:
    """Fits costs to what was measured, and checks them by leaving out one model after another."""
    widths = widths_measured(model.intermediate_size)
    quantities = [name for name in TIMES if name in measured["whole"]]
    values = {
        quantity: {name: measured[name][quantity] for name in shapes} for quantity in (*quantities, "weight_bytes")
    }
    costs = {quantity: _fitted(shapes, values[quantity], widths) for quantity in quantities}
    costs["weight_bytes"] = _fitted(shapes, values["weight_bytes"], widths).model_copy(update={"error": None})
    costs["kv_bytes_per_token"] = _kv(shapes["whole"], measured["whole"], widths)
    return CostsDocument(
        schema_version=1,
        kind="costs",
        sentei_version=version("sentei"),
        model=model,
        served=bench.served,
        load=bench.load,
        repeats=bench.settings.repeats,
        costs=costs,
        check=[each for quantity in quantities for each in _left_out(quantity, shapes, values[quantity], widths)],
        models=[
            MeasuredModel(
                name=name,
                attention=[layer.attention for layer in layout],
                intermediate_size=[layer.intermediate_size for layer in layout],
                measured=measured[name],
            )
            for name, layout in shapes.items()
        ],
    )


def _fitted(layouts: Mapping[str, Layout], values: Mapping[str, list[float]], widths: tuple[int, ...]) -> PartsRecord:
    fit = fit_parts(list(layouts.values()), [values[name] for name in layouts], widths)
    error = ErrorRecord(covariance=fit.covariance.tolist(), degrees_of_freedom=fit.degrees_of_freedom)
    return _recorded(fit.costs, error)


def _kv(layout: Layout, measured: Measured, widths: tuple[int, ...]) -> PartsRecord:
    """A KV cache belongs to attentions alone."""
    [total] = measured["kv_bytes_per_token"]
    each = total / sum(layer.attention for layer in layout)
    return _recorded(PartCosts(outside=0.0, attention=each, widths=widths, ffn=(0.0,) * len(widths)), None)


def _recorded(costs: PartCosts, error: ErrorRecord | None) -> PartsRecord:
    return PartsRecord(
        outside=costs.outside, attention=costs.attention, widths=list(costs.widths), ffn=list(costs.ffn), error=error
    )


def _left_out(
    quantity: str, layouts: Mapping[str, Layout], values: Mapping[str, list[float]], widths: tuple[int, ...]
) -> list[CheckRecord]:
    """Each model as the others predict it; a model without which they tell no cost apart is left out."""
    found = []
    for name, layout in layouts.items():
        others = {other: each for other, each in layouts.items() if other != name}
        if not tell_apart(list(others.values()), widths):
            continue
        fit = fit_parts(list(others.values()), [values[other] for other in others], widths)
        predicted, measured = fit.costs.of(layout), fmean(values[name])
        found.append(
            CheckRecord(
                model=name, quantity=quantity, predicted=predicted, measured=measured, error=predicted / measured - 1
            )
        )
    return found
