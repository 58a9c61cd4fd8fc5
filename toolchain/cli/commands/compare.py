"""``sentei compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from toolchain.cli.console import Output
from toolchain.cli.options import JsonOption, QuietOption


def compare(
    one: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="results.json or its directory, or a JSON file of vllm bench serve, guidellm or aiperf."
        ),
    ],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another run, from another day, machine or version.")],
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Set two benchmarks side by side, or say why they cannot be compared."""
    output = Output(as_json=as_json, quiet=quiet)
    from serving.benchmark.comparison.tools import compare_files

    result = compare_files(one, other)
    show = _show_pairs if "pairs" in result else _show
    output.result(result, lambda console: show(console, result))


def _show_pairs(console: Console, result: dict[str, Any]) -> None:
    for pair in result["pairs"]:
        before, after = (f"{pair[name]['tool']}, {pair[name]['model']}" for name in ("a", "b"))
        console.print(f"A: {before} → B: {after}: {_load_told(pair['a'])}")
        for name, count in pair["failed_requests"].items():
            if count:
                console.print(f"  {name.upper()}: {count} requests failed, so nothing is compared.")
        for name, metric in pair["metrics"].items():
            ratio = metric["ratio"]
            interval = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio["low"] is not None else ""
            console.print(
                f"  {name:<24} {metric['a']:>9.4g} → {metric['b']:>9.4g} {metric['unit']:<10} "
                f"{ratio['value']:.2f}{interval}{', ' + metric['verdict'] if metric['verdict'] else ''}",
            )
    for name, why in result["not_compared"]:
        console.print(f"Not compared: {name}: {why}.")
    if result["note"]:
        console.print(result["note"])


def _load_told(load: dict[str, Any]) -> str:
    rate = f", {load['request_rate']:g} requests/s" if load["request_rate"] else ""
    at_a_time = f", {load['concurrency']} at a time" if load["concurrency"] else ""
    return f"{load['input_len']:.4g} tokens in, {load['output_len']:.4g} out{at_a_time}{rate}"


def _show(console: Console, result: dict[str, Any]) -> None:
    for load in result["loads"]:
        shape = load["workload"]
        rate = f", {shape['request_rate']:g} requests/s" if shape.get("request_rate") else ""
        at_a_time = f", {shape['concurrency']} at a time" if shape["concurrency"] else ""
        console.print(
            f"{shape['input_len']} tokens in, {shape['output_len']} out{at_a_time}{rate}: A → B, B/A (95 % interval)",
        )
        _show_metrics(console, load["metrics"])
        for side, count in load["failed_requests"].items():
            if count:
                console.print(f"  {side}: {count} requests failed, so nothing is compared.")
    if goodput := result["goodput"]:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput["slo_ms"].items())
        console.print(f"Highest load with {limits}: A → B, B/A (95 % interval)")
        _show_metrics(console, goodput["metrics"])
        for side in goodput["unmet"]:
            console.print(f"  {side}: not met in every repeat, so nothing is compared.")
    if result["left_out"]:
        console.print(f"{result['left_out']} loads were measured in one run alone and are left out.")
    if result["goodput_left_out"]:
        console.print(
            "The highest load within limits is left out: one run alone has it, or limits or lengths differ.",
        )
    console.print("What differs between the runs:" if result["changed"] else "Nothing else differs.")
    for name, before, after in result["changed"]:
        console.print(f"  {name}: {before} → {after}")


def _show_metrics(console: Console, metrics: dict[str, Any]) -> None:
    for name, metric in metrics.items():
        role = " (exploratory)" if metric["role"] == "exploratory" else ""
        for side in ("original", "pruned"):
            if (found := metric[side]) is None:
                continue
            ratio, verdict = found["ratio"], found["verdict"]
            console.print(
                f"  {name:<24} {side:<9} {found['a']:>9.4g} → {found['b']:>9.4g} {metric['unit']:<10} "
                f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
                f"{f', {verdict}{role}' if verdict else ''}",
            )
        if found := metric["pruned_against_original"]:
            ratio = found["ratio"]
            gains = f"{found['a']:.3g}x → {found['b']:.3g}x"
            console.print(
                f"  {'':<24} gain over the original: {gains}, {ratio['value']:.2f} ({ratio['low']:.2f} to "
                f"{ratio['high']:.2f}), {found['verdict']}{role}",
            )
