"""Draws what the canary's acceptance test recorded, and prints the figures that docs/guides/deploy.md states.

SENTEI_CANARY_RECORD=record.json pytest -m acceptance tests/serving/canary
python -m benchmarks.canary record.json benchmarks/results/canary.json docs/canary.png

The second file is the record without the single requests: their numbers in blocks of 5 seconds. The picture needs
Chromium.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

BLOCK_S = 5
WIDTH, HEIGHT = 1200, 560
COLOURS = {"original": "#9aa5b1", "candidate": "#2a7f62", "lost": "#c62828"}
ANSWERS = {"promote": "#2a7f62", "wait": "#9aa5b1", "roll_back": "#c62828"}


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers of requests in blocks, and what became of them during each fault."""
    requests = record["requests"]
    blocks = int(max(each["sent_s"] for each in requests) // BLOCK_S) + 1
    counts = {kind: [0] * blocks for kind in COLOURS}
    for each in requests:
        counts["lost" if each["problem"] else each["side"]][int(each["sent_s"] // BLOCK_S)] += 1
    faults = []
    for fault in record["faults"]:
        during = [e for e in requests if e["ended_s"] >= fault["begun_s"] and e["sent_s"] <= fault["ended_s"]]
        lost = [each for each in during if each["problem"]]
        faults.append(
            {
                **fault, "requests": len(during), "lost": len(lost),
                "lost_streams_that_had_begun": sum(each["is_stream"] and each["has_begun"] for each in lost),
                "slowest_s": max(each["ended_s"] - each["sent_s"] for each in during if not each["problem"]),
            }
        )  # fmt: skip
    return {
        "block_s": BLOCK_S, "requests": len(requests), "lost": sum(bool(each["problem"]) for each in requests),
        "counts": counts, "steps": record["steps"], "answers": record["answers"], "faults": faults,
    }  # fmt: skip


def figure(found: dict[str, Any]) -> go.Figure:
    """Requests per second by who answered; steps, faults and the gate's answers above."""
    blocks = range(len(found["counts"]["original"]))
    times = [found["block_s"] * block for block in blocks]
    drawn = go.Figure()
    for kind, colour in COLOURS.items():
        per_s = [count / found["block_s"] for count in found["counts"][kind]]
        drawn.add_bar(x=times, y=per_s, name=kind, marker_color=colour, width=found["block_s"], offset=0)
    top = max(sum(found["counts"][kind][block] for kind in COLOURS) for block in blocks) / found["block_s"]
    for decision, colour in ANSWERS.items():
        at = [time_s for time_s, answer, _ in found["answers"] if answer == decision]
        drawn.add_scatter(
            x=at, y=[1.08 * top] * len(at), mode="markers", name=f"gate: {decision.replace('_', ' ')}",
            marker={"color": colour, "symbol": "diamond", "size": 9},
        )  # fmt: skip
    for time_s, share in found["steps"]:
        drawn.add_vline(x=time_s, line={"color": "#333", "width": 1, "dash": "dot"})
        drawn.add_annotation(
            x=time_s, y=1.22 * top, text=f"{share} %", showarrow=False, xanchor="left", textangle=-90, font={"size": 11}
        )
    for fault in found["faults"]:
        drawn.add_vrect(x0=fault["begun_s"], x1=fault["ended_s"], fillcolor="#c62828", opacity=0.08, line_width=0)
        drawn.add_annotation(
            x=fault["begun_s"], y=1.34 * top, text=f"<b>{fault['name']}</b>", showarrow=False, xanchor="left",
            font={"size": 12, "color": "#c62828"},
        )  # fmt: skip
    drawn.update_layout(
        barmode="stack", template="plotly_white", width=WIDTH, height=HEIGHT, legend={"orientation": "h", "y": -0.15},
        title="A canary: share of the candidate, faults, and who answered",
        xaxis_title="seconds", yaxis_title="requests per second",
    )  # fmt: skip
    return drawn


def draw(drawn: go.Figure, out: Path) -> None:
    """Writes a PNG."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("There is no Chromium to draw with.")
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "page.html"
        plot = drawn.to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False})
        page.write_text(f"<body style='margin:0'>{plot}</body>")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
        command = [chromium, *options, "--virtual-time-budget=20000", f"--screenshot={out.resolve()}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)


def main() -> None:
    """See the module."""
    record, results, picture = map(Path, sys.argv[1:])
    found = summarize(json.loads(record.read_text()))
    results.write_text(json.dumps(found, indent=1) + "\n")
    draw(figure(found), picture)
    print(f"{found['requests']:,} requests, {found['lost']} lost")
    for fault in found["faults"]:
        print(
            f"{fault['name']}: told after {fault['told_s'] - fault['begun_s']:.0f} s, last request to the candidate "
            f"{fault['last_sent_s'] - fault['rolled_back_s']:+.1f} s after the change of weights, {fault['lost']} of "
            f"{fault['requests']} lost ({fault['lost_streams_that_had_begun']} streams that had begun), slowest answer "
            f"{fault['slowest_s']:.1f} s; {fault['reason']}"
        )


if __name__ == "__main__":
    main()
