"""``sentei benchmark``."""

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from toolchain.cli.console import Output, pick_dtype
from toolchain.cli.options import (
    CONCURRENCY,
    INPUT_LEN,
    OUTPUT_LEN,
    DeviceOption,
    ForceOption,
    JsonOption,
    OwnDtypeOption,
    QuietOption,
    concurrency_option,
    input_len_option,
    out_option,
    output_len_option,
    resume_option,
)
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.outputs import check_output_directory, writes_directory

_LOAD, _SERVER = "Load", "Server"
N = TypeVar("N", int, float)


class BenchmarkEngine(StrEnum):
    """What runs the models while they are measured."""

    transformers = "transformers"
    onnx = "onnx"
    onnx_server = "onnx-server"
    vllm = "vllm"
    vllm_offline = "vllm-offline"


class PresetName(StrEnum):
    """Loads that have a name; see :data:`serving.benchmark.workload.PRESETS`."""

    chat = "chat"
    rag = "rag"
    batch = "batch"
    classify = "classify"


@writes_directory
def benchmark(
    original: Annotated[
        str, typer.Argument(metavar="ORIGINAL", help="The original: a directory, a hub id, or its ONNX export.")
    ],
    pruned: Annotated[
        str | None, typer.Argument(metavar="PRUNED", help="The pruned model. Without it, one --url is measured alone.")
    ] = None,
    *,
    engine: Annotated[BenchmarkEngine, typer.Option(help="What runs the models.")],
    out: Annotated[Path, out_option("Directory for results.json.")],
    workload: Annotated[
        PresetName | None,
        typer.Option(
            help="chat: 512 tokens in, 256 out, 8 at a time; rag: 4096/512, 4; batch: 512/128, 64; classify: 512/1, 8.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    input_len: Annotated[int | None, input_len_option(f" ({INPUT_LEN})", panel=_LOAD)] = None,
    output_len: Annotated[int | None, output_len_option(f" ({OUTPUT_LEN})", panel=_LOAD)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Your own prompts: JSONL, {"prompt": "...", "output_tokens": 128} per line.', rich_help_panel=_LOAD
        ),
    ] = None,
    concurrency: Annotated[str | None, concurrency_option(f" ({CONCURRENCY}), or a sweep: 1,4,16", panel=_LOAD)] = None,
    request_rate: Annotated[
        str | None, typer.Option(help="Poisson arrivals per second, or a sweep: 0.5,1,2.", rich_help_panel=_LOAD)
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            help="Find the highest request rate that meets limits in ms: ttft=500,tpot=50.", rich_help_panel=_LOAD
        ),
    ] = None,
    attainment: Annotated[
        float, typer.Option(help="Share of requests that must meet the limits of --slo.", rich_help_panel=_LOAD)
    ] = 0.9,
    range_ratio: Annotated[
        float, typer.Option(help="Draw lengths evenly within this share of them, such as 0.5.", rich_help_panel=_LOAD)
    ] = 0.0,
    num_prompts: Annotated[int | None, typer.Option(help="Requests per repeat.", rich_help_panel=_LOAD)] = None,
    repeats: Annotated[int, typer.Option(help="Alternating runs of each model; at least 3.")] = 5,
    primary: Annotated[
        str, typer.Option(help="The metric that decides, such as mean_ttft_ms; the others are exploratory.")
    ] = "output_throughput",
    mixed_precision: Annotated[
        bool,
        typer.Option(
            "--mixed-precision", help="Allow models of different precision. The gain is then not from pruning alone."
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of the machine, to report the cost per million output tokens.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: OwnDtypeOption = "auto",
    engine_option: Annotated[
        list[str] | None,
        typer.Option(
            help="Passed to vLLM or the server, as in --engine-option=--enforce-eager.", rich_help_panel=_SERVER
        ),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(help="A running server; one for each model, the original's first.", rich_help_panel=_SERVER),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the server's key.", rich_help_panel=_SERVER)
    ] = None,
    start_timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds until a server that was started must be ready.", rich_help_panel=_SERVER),
    ] = 900,
    stall_timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds without a token until an engine counts as hung.", rich_help_panel=_SERVER),
    ] = 600,
    resume: Annotated[bool, resume_option("benchmark")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure original against pruned, alternating, on this machine."""
    output = Output(as_json=as_json, quiet=quiet)
    pick_dtype(dtype, auto=None)
    from serving.benchmark.run import benchmark as run
    from serving.benchmark.settings import BenchmarkSettings
    from serving.benchmark.workload import PRESETS, make_workloads, parse_slo, read_prompts
    from toolchain.checkpoint.directory import resolve_model

    directory = resolve_model(original)
    preset = PRESETS[workload.value] if workload else None
    if prompts and (preset or input_len):
        raise SenteiError("--prompts brings its own lengths.", "Leave out --workload and --input-len.")
    if prompts:
        check_output_directory(out, force=force, inputs=[prompts])
    rates = _numbers("--request-rate", request_rate, float)
    in_flight = _numbers("--concurrency", concurrency, int)
    if not in_flight and not rates:
        in_flight = [preset.concurrency if preset else CONCURRENCY]
    workloads = make_workloads(
        engine=engine.value,
        input_len=first_given(input_len, preset.input_len if preset else None, INPUT_LEN),
        output_len=first_given(output_len, preset.output_len if preset else None, OUTPUT_LEN),
        concurrency=in_flight,
        request_rate=rates,
        num_prompts=num_prompts,
        range_ratio=range_ratio,
        prompts=read_prompts(prompts, output_len=output_len, tokenizer=directory) if prompts else None,
    )
    with output.telling_what_stays():
        settings = BenchmarkSettings(
            engine=engine.value,
            workloads=workloads,
            slo=None if slo is None else parse_slo(slo),
            attainment=attainment,
            repeats=repeats,
            primary=primary,
            device=device,
            dtype=None if dtype == "auto" else dtype,
            engine_options=engine_option or (),
            urls=url or (),
            api_key=_api_key(api_key_env),
            mixed_precision=mixed_precision,
            price_per_hour=price_per_hour,
            start_timeout_s=start_timeout,
            stall_timeout_s=stall_timeout,
        )
        results = run(
            directory,
            None if pruned is None else resolve_model(pruned),
            settings,
            out=out,
            force=force,
            resume=resume,
            on_progress=output.note,
        )
    output.result({"directory": str(out), **results}, lambda console: show_results(console, out, results))
    failed = sum(sum(each["failed_requests"].values()) for each in results["measurements"])
    if failed:
        raise CheckFailedError(
            f"{failed} requests failed; where they did, nothing is compared.", f"See {out}/results.json and the logs."
        )


def show_results(console: Console, out: Path, results: dict[str, Any]) -> None:
    """Prints each load's medians and gains with their intervals."""
    for measurement in results["measurements"]:
        load = measurement["workload"]
        how = [f"{load['concurrency']} at a time"] if load["concurrency"] else []
        how += [f"{load['request_rate']:g} requests/s"] if load["request_rate"] else []
        console.print(
            f"{out}, {results['engine']}, {load['input_len']} tokens in, {load['output_len']} out, {', '.join(how)}: "
            "original → pruned, gain (95 % interval)",
        )
        failed = {side: count for side, count in measurement["failed_requests"].items() if count}
        for side, count in failed.items():
            console.print(f"  {side}: {count} requests failed, so nothing is claimed.")
        if not failed:
            _show_metrics(console, measurement["metrics"])
    if cost := results["measurements"][0]["cost"]:
        each = cost["per_million_output_tokens"]
        shown = " → ".join(f"{value:.4g}" for value in each.values() if value)
        console.print(f"A million output tokens cost {shown}.")
    if goodput := results["goodput"]:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput["slo_ms"].items())
        console.print(f"Highest load at which {100 * goodput['attainment']:g}% of requests meet {limits}:")
        _show_metrics(console, goodput["metrics"])
        _show_unmet(console, goodput["metrics"]["max_request_rate"])


def _show_unmet(console: Console, rate: dict[str, Any]) -> None:
    """Where a repeat found no rate there is no gain: says so, and what the other model reached."""
    values = {side: rate[side]["values"] for side in ("original", "pruned") if rate[side]["values"]}
    if all(map(all, values.values())):
        return
    for side, found in values.items():
        unmet = sum(not value for value in found)
        said = f"not met in {unmet} of {len(found)} repeats" if unmet else f"{rate[side]['median']:.4g} {rate['unit']}"
        console.print(f"  {side}: {said}")


def _show_metrics(console: Console, metrics: dict[str, Any]) -> None:
    for name, metric in metrics.items():
        gain, median = metric["gain"], metric["original"]["median"]
        if gain is None and not metric["pruned"]["values"] and median is not None:
            console.print(f"  {name:<24} {median:>9.4g} {metric['unit']}")
        if gain is None:
            continue
        console.print(
            f"  {name:<24} {metric['original']['median']:>9.4g} → {metric['pruned']['median']:>9.4g} "
            f"{metric['unit']:<10} {gain['value']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f}), "
            f"{metric['verdict']}{' (exploratory)' if metric['role'] == 'exploratory' else ''}",
        )


def _numbers(option: str, text: str | None, kind: Callable[[str], N]) -> list[N]:
    try:
        return [] if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise SenteiError(f"{option} {text!r} is not a number or a list of them.", "Write it like 1,4,16.") from error


def first_given(*values: int | None) -> int:
    """The first that is not ``None``; there is one."""
    return next(value for value in values if value is not None)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise SenteiError(f"--api-key-env: the environment has no {variable}.", "Give the name, not the key.")
    return key
