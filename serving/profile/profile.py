"""`costs.json` from beginning to end: models are measured, costs fitted to most of them and checked by the rest."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from serving.profile.measure import Bench, Measured, measure_models
from serving.profile.shapes import Layout, Shape, num_layers_measured, shapes_to_measure, widths_measured
from toolchain.checkpoint.directory import model_name
from toolchain.costs.document import (
    TIMES,
    CheckRecord,
    CostsDocument,
    MeasuredModel,
    PartsRecord,
    ShapedModel,
    config_sha256,
)
from toolchain.costs.parts import PartCosts, fit_parts
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
    }
    work = Unfinished(out, PROFILE, force=force, resume=resume)
    with work.working(identity):
        work.worth_keeping = True  # models on disk, and then each measurement
        measured = measure_models(bench, {name: each.layout for name, each in shapes.items()}, work.directory)
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
    bench: Bench, model: ShapedModel, shapes: Mapping[str, Shape], measured: Mapping[str, Measured]
) -> CostsDocument:
    """Fits costs to what was measured, and checks them."""
    fitted = {name: shape.layout for name, shape in shapes.items() if shape.role == "fitted"}
    widths = widths_measured(model.intermediate_size)
    quantities = [name for name in TIMES if name in measured["whole"]]
    costs = {
        quantity: _fitted(fitted, {name: measured[name][quantity] for name in fitted}, widths)
        for quantity in (*quantities, "weight_bytes")
    }
    costs["kv_bytes_per_token"] = _kv(fitted["whole"], measured["whole"], widths)
    return CostsDocument(
        schema_version=1,
        kind="costs",
        sentei_version=version("sentei"),
        model=model,
        served=bench.served,
        load=bench.load,
        costs=costs,
        check=[
            _check(name, quantity, costs[quantity], shape.layout, measured[name][quantity])
            for name, shape in shapes.items()
            if shape.role == "held_out"
            for quantity in quantities
        ],
        models=[
            MeasuredModel(
                name=name,
                role=shape.role,
                attention=[layer.attention for layer in shape.layout],
                intermediate_size=[layer.intermediate_size for layer in shape.layout],
                measured=measured[name],
            )
            for name, shape in shapes.items()
        ],
    )


def _fitted(layouts: Mapping[str, Layout], values: Mapping[str, list[float]], widths: tuple[int, ...]) -> PartsRecord:
    """Costs by repeat: what drifts from one repeat to the next is in all models of a repeat alike."""
    repeats = zip(*(values[name] for name in layouts), strict=True)
    return _recorded([fit_parts(list(layouts.values()), each, widths) for each in repeats])


def _kv(layout: Layout, measured: Measured, widths: tuple[int, ...]) -> PartsRecord:
    """A KV cache belongs to attentions alone."""
    [total] = measured["kv_bytes_per_token"]
    each = total / sum(layer.attention for layer in layout)
    return _recorded([PartCosts(outside=0.0, attention=each, widths=widths, ffn=(0.0,) * len(widths))])


def _recorded(repeats: list[PartCosts]) -> PartsRecord:
    return PartsRecord(
        outside=[each.outside for each in repeats],
        attention=[each.attention for each in repeats],
        widths=list(repeats[0].widths),
        ffn=[list(at_width) for at_width in zip(*(each.ffn for each in repeats), strict=True)],
    )


def _check(model: str, quantity: str, costs: PartsRecord, layout: Layout, values: list[float]) -> CheckRecord:
    predicted, measured = fmean(each.of(layout) for each in costs.repeats), fmean(values)
    return CheckRecord(
        model=model, quantity=quantity, predicted=predicted, measured=measured, error=predicted / measured - 1
    )
