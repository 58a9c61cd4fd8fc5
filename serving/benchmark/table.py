"""A benchmark's figures as one table, in Markdown for people and in CSV for spreadsheets."""

import csv
import io
from collections.abc import Mapping
from typing import Any

COLUMNS = (
    "load", "metric", "role", "unit", "original", "pruned", "gain", "low", "high", "expected", "verdict",
    "failed_requests",
)  # fmt: skip


def table_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a load and metric; each model's median, and undefined values are ``None``."""
    rows = []
    for measurement in results["measurements"]:
        load = measurement["workload"]
        rate = load["request_rate"]
        arrivals = f"{rate:g} requests/s" if rate else f"{load['concurrency']} at a time"
        label = f"{load['input_len']} in, {load['output_len']} out, {arrivals}"
        failed, expected = sum(measurement["failed_requests"].values()), measurement["expected"]
        rows += _rows(label, measurement["metrics"], failed, {name: each["gain"] for name, each in expected.items()})
    if goodput := results["goodput"]:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput["slo_ms"].items())
        rows += _rows(f"highest load with {limits}", goodput["metrics"], 0, {})
    return rows


def as_csv(results: Mapping[str, Any]) -> str:
    """The table with a header line; full precision, nothing where undefined."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_rows(results))
    return text.getvalue()


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table with what it is of; four significant digits, a dash where undefined."""
    models = results["models"]
    lines = [
        f"# {' against '.join(models[side]['name'] for side in ('pruned', 'original') if side in models)}, "
        f"{results['engine']}",
        "",
        results["ratio_formula"],
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(_cell(row[name]) for name in COLUMNS) + " |" for row in table_rows(results)]
    return "\n".join(lines) + "\n"


def _rows(label: str, metrics: Mapping[str, Any], failed: int, expected: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "load": label,
            "metric": name,
            "role": metric["role"],
            "unit": metric["unit"],
            "original": metric["original"]["median"],
            "pruned": metric["pruned"]["median"],
            "gain": (metric["gain"] or {}).get("value"),
            "low": (metric["gain"] or {}).get("low"),
            "high": (metric["gain"] or {}).get("high"),
            "expected": expected.get(name),
            "verdict": metric["verdict"],
            "failed_requests": failed,
        }
        for name, metric in metrics.items()
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
