"""``sentei compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from toolchain.cli.console import Output
from toolchain.cli.options import JsonOption, QuietOption


def compare(
    one: Annotated[Path, typer.Argument(metavar="A", help="results.json, or its directory.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another, of another day, machine or version.")],
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Set two benchmarks side by side, or say why they cannot be compared."""
    output = Output(as_json=as_json, quiet=quiet)
    from serving.benchmark.compare_runs import compare_results

    result = compare_results(one, other)
    output.result(result, lambda console: _show(console, result))


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
        for side in ("original", "pruned"):
            if (found := metric[side]) is None:
                continue
            ratio = found["ratio"]
            console.print(
                f"  {name:<24} {side:<9} {found['a']:>9.4g} → {found['b']:>9.4g} {metric['unit']:<10} "
                f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), {found['verdict']}"
                f"{' (exploratory)' if metric['role'] == 'exploratory' else ''}",
            )
