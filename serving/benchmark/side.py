"""One of the models that a benchmark compares: opened once, and asked by every part of the benchmark."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from serving.benchmark.ratios import SIDES
from serving.benchmark.settings import BenchmarkSettings
from serving.forecast.estimate import tiled_facts
from serving.forecast.model_facts import ModelFacts, facts_of, facts_of_export, files_sha256, size_on_disk
from serving.onnx_export.files import is_onnx_export, read_settings
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint, dtype_name
from toolchain.checkpoint.quantized import open_servable
from toolchain.errors import SenteiError


@dataclass(kw_only=True, eq=False)
class Side:
    """A model, and what its engine last reported. Only that report changes.

    Attributes:
        name: ``original`` or ``pruned``.
        directory: Of the checkpoint or the ONNX export.
        facts: What its files say.
        layout: Of a checkpoint's layers; an ONNX export does not say.
        tiled_facts: Facts with each FFN as wide as the next multiple of what matrix units want; ``None`` of what is
            quantised or an ONNX export.
        stored_dtype: Of a checkpoint's weights.
        export_device: What an ONNX export is made for.
        url: Of a server that runs it already.
        engine_report: What the engine reported of itself when it was last started; empty before.
    """

    name: str
    directory: Path
    facts: ModelFacts
    layout: tuple[LayerLayout, ...] = ()
    tiled_facts: ModelFacts | None = None
    stored_dtype: str | None = None
    export_device: str | None = None
    url: str | None = None
    engine_report: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def files_sha256(self) -> str:
        """Reads all weights, once."""
        return files_sha256(self.directory)


def open_sides(original: Path, pruned: Path | None, settings: BenchmarkSettings) -> dict[str, Side]:
    """Opens one model or two, and checks that they can be compared.

    Raises:
        SenteiError: A directory that is not good or not for this engine, or two models that are not comparable.
        MissingDependencyError: onnx is not installed.
    """
    directories = dict(zip(SIDES, [original] if pruned is None else [original, pruned], strict=False))
    if not settings.spec.reads_onnx:
        for path in directories.values():
            if is_onnx_export(path):
                raise SenteiError(f"{path} is an ONNX export.", "Use --engine onnx or onnx-server, or its checkpoint.")
    urls = dict(zip(directories, settings.urls, strict=False))
    sides = {name: open_side(name, path, settings, urls.get(name)) for name, path in directories.items()}
    _check_comparable(sides, settings)
    if settings.spec.reads_onnx and settings.device == "auto":
        check_one_device(sides)
    return sides


def open_side(name: str, directory: Path, settings: BenchmarkSettings, url: str | None = None) -> Side:
    """Opens one model of a kind that the engine reads.

    Raises:
        SenteiError: A directory that is not good or not for this engine.
        MissingDependencyError: onnx is not installed.
    """
    if settings.spec.reads_onnx:
        export = read_settings(directory)
        facts = facts_of_export(directory, export)
        return Side(name=name, directory=directory, facts=facts, export_device=export.device, url=url)
    checkpoint = open_servable(directory)
    itemsize = getattr(torch, settings.dtype).itemsize if settings.dtype else checkpoint.dtype.itemsize
    facts = facts_of(checkpoint, settings.dtype, size_on_disk_bytes=size_on_disk(directory))
    tiled = tiled_facts(checkpoint, settings.dtype) if isinstance(checkpoint, Checkpoint) else None
    return Side(
        name=name,
        directory=directory,
        facts=settings.shape.applied(facts, itemsize),
        layout=tuple(checkpoint.layout),
        tiled_facts=None if tiled is None else settings.shape.applied(tiled, itemsize),
        stored_dtype=dtype_name(checkpoint.dtype),
        url=url,
    )


def check_one_device(sides: Mapping[str, Side]) -> None:
    """Refuses ONNX exports for unlike devices.

    Raises:
        SenteiError: They are.
    """
    devices = {name: side.export_device for name, side in sides.items()}
    if len(set(devices.values())) > 1:
        raise SenteiError(
            f"The original is exported for {devices['original']} and the pruned model for {devices['pruned']}.",
            "Export both alike.",
        )


def _check_comparable(sides: Mapping[str, Side], settings: BenchmarkSettings) -> None:
    facts = {name: side.facts for name, side in sides.items()}
    if len({each.precision for each in facts.values()}) > 1 and not settings.mixed_precision:
        raise SenteiError(
            f"The original is {facts['original'].precision} and the pruned model {facts['pruned'].precision}: what "
            "comes of pruning could not be told from what comes of precision.",
            "Export both alike, give a dtype, or add --mixed-precision to measure both together.",
        )
    sizes = {name: each.weight_bytes for name, each in facts.items()}
    if sizes["original"] < sizes.get("pruned", 0):
        raise SenteiError(
            f"The original has {sizes['original']:,} bytes of weights and the pruned model {sizes['pruned']:,}.",
            "Are they swapped? The original comes first.",
        )
    needed = max(each.longest for each in settings.workloads)
    for name, each in facts.items():
        # The server of ONNX exports answers in batches, which have one rotary table for all rows.
        most = each.served_len if settings.spec.reads_onnx and settings.spec.is_server else each.max_len
        if needed > most:
            raise SenteiError(
                f"{needed} tokens, input and output, do not fit the {name} model, which takes {most}.",
                "Shorten one of them.",
            )
