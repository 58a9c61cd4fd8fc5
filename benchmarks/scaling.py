"""``sentei prune`` in one process and in two, of one thread each: seconds stage by stage, and the same plan.

    python benchmarks/scaling.py -o benchmarks/results/scaling.json

Runs the published search and the default prune, both at 50 % on the demo model. Wall seconds need a quiet machine with
a core per process. Processor seconds, of the rank that took the most, say what can be hoped for where there is none.
What is measured already in the output is not measured again.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.benchmark.environment import describe_environment
from toolchain.outputs import write_text
from toolchain.prune.methods import DEFAULT_NAME

# What progress calls the stages, and what they are called here; what is left is loading, checking and measuring.
_STAGES = {
    "Importance of neurons": "importance",
    "Sensitivity of neurons": "gradients",
    "Widths of FFNs": "widths",
    "Search for attentions": "search",
    "Compensation": "compensation",
    "Writing the checkpoint": "writing",
}
_METHODS = {"exact search": "2ssp", "default": DEFAULT_NAME}
_LONGEST_S = 4 * 3600
_SHARE_OF_RANK = "SCALING_SHARE"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write, or to go on with.")],
    model: Annotated[Path | None, typer.Option(help="Model directory; without it, the demo model.")] = None,
    sparsity: Annotated[float, typer.Option(help="Of decoder-block parameters.")] = 0.5,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    align: Annotated[int, typer.Option(help="FFN widths are multiples of this.")] = 64,
    ranks: Annotated[list[int], typer.Option(help="How many processes; may be given several times.")] = [1, 2],  # noqa: B006
) -> None:
    """Measures, and writes after each run."""
    asked = {
        "sparsity": sparsity,
        "samples": samples,
        "seq_len": seq_len,
        "align": align,
        "model": str(model or "demo"),
    }
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    if found.get("asked", asked) != asked:
        raise typer.BadParameter(f"{out} was measured with {found['asked']}.")
    with tempfile.TemporaryDirectory() as temporary:
        directory = model or _demo_model(Path(temporary))
        for name, method in _METHODS.items():
            runs = found["runs"].setdefault(name, {})
            for count in (each for each in ranks if str(each) not in runs):
                runs[str(count)] = _measured(directory, method, asked, count, Path(temporary) / f"{method}-{count}")
                found = {
                    "schema_version": 1, "kind": "scaling_benchmark", "asked": asked, "runs": found["runs"],
                    "environment": describe_environment(),
                }  # fmt: skip
                write_text(out, json.dumps(found, indent=2) + "\n")
            _show(name, runs)


def _demo_model(directory: Path) -> Path:
    from toolchain.model.gguf import demo_gguf, import_gguf

    import_gguf(demo_gguf(), directory / "demo")
    return directory / "demo"


def _measured(model: Path, method: str, asked: dict[str, Any], count: int, out: Path) -> dict[str, Any]:
    """Runs one prune in ``count`` processes; seconds by stage, and the plan's hash."""
    share = out.with_suffix(".json")
    worker = [__file__, "--worker"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = ["--master-addr", "127.0.0.1", "--master-port", str(server.getsockname()[1])]
    launched = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), *place] if count > 1 else []
    words = {**asked, "model": str(model), "method": method, "out": str(out), "share": str(share)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", _SHARE_OF_RANK: json.dumps(words)}
    subprocess.run([sys.executable, *launched, *worker], check=True, timeout=_LONGEST_S, env=environment)
    by_rank = [json.loads(share.with_suffix(f".{rank}").read_text()) for rank in range(count)]
    plan = json.loads((out / "plan.json").read_text())
    return {
        "wall_s": {stage: round(seconds, 2) for stage, seconds in by_rank[0]["wall_s"].items()},
        "cpu_s_of_the_busiest": {
            stage: round(max(each["cpu_s"].get(stage, 0.0) for each in by_rank), 2) for stage in by_rank[0]["cpu_s"]
        },
        "layer_forwards": [each["layer_forwards"] for each in by_rank],
        "plan_sha256": hashlib.sha256((out / "plan.json").read_bytes()).hexdigest(),
        "removed": [step["removed"] for step in plan["trace"]],
    }


def _work() -> None:
    """One rank of a measured run."""
    import torch

    from toolchain.model.layer_walk import LayerWalk
    from toolchain.prune.methods import METHODS
    from toolchain.prune.pipeline import prune
    from toolchain.prune.settings import PruneSettings
    from toolchain.ranks.joining import end, join, last_word

    asked = json.loads(os.environ[_SHARE_OF_RANK])
    ranks = join()
    settings = PruneSettings(
        sparsity=asked["sparsity"], calibration=[], num_samples=asked["samples"], seq_len=asked["seq_len"],
        align=asked["align"], attention_removals=None, device="cpu", dtype=torch.float32, seed=0,
        **METHODS[asked["method"]].settings,
    )  # fmt: skip
    walks = _remembered(LayerWalk)
    wall, cpu = {"whole": 0.0}, {"whole": 0.0}
    with _timed("whole", wall, cpu):
        prune(
            Path(asked["model"]), Path(asked["out"]), settings, model_name="model",
            progress=lambda description, _total: _stage(_STAGES.get(description, description), wall, cpu), ranks=ranks,
        )  # fmt: skip
    for each in (wall, cpu):
        each["rest"] = each["whole"] - sum(seconds for stage, seconds in each.items() if stage != "whole")
    said = {"wall_s": wall, "cpu_s": cpu, "layer_forwards": sum(each.num_layer_forwards for each in walks)}
    Path(asked["share"]).with_suffix(f".{ranks.rank}").write_text(json.dumps(said))
    end(last_word("", 0)[1])


def _remembered(kind: type[Any]) -> list[Any]:
    """All walks that are made from now on: they count what they run."""
    made: list[Any] = []
    real = kind.__init__

    def remember(self: Any, *args: Any, **settings: Any) -> None:
        made.append(self)
        real(self, *args, **settings)

    kind.__init__ = remember  # type: ignore[misc]
    return made


@contextmanager
def _timed(stage: str, wall: dict[str, float], cpu: dict[str, float]) -> Iterator[None]:
    started, began = time.monotonic(), time.process_time()
    yield
    wall[stage] = wall.get(stage, 0.0) + time.monotonic() - started
    cpu[stage] = cpu.get(stage, 0.0) + time.process_time() - began


@contextmanager
def _stage(stage: str, wall: dict[str, float], cpu: dict[str, float]) -> Iterator[Callable[[], None]]:
    with _timed(stage, wall, cpu):
        yield lambda: None


def _show(name: str, runs: dict[str, Any]) -> None:
    """Prints the stages side by side, with what two processes gain over one."""
    first, *others = runs.values()
    for stage, alone in first["wall_s"].items():
        cells = [f"{alone:9.1f} s"]
        for other in others:
            for kind in ("wall_s", "cpu_s_of_the_busiest"):
                one, two = (each[kind].get(stage, 0.0) for each in (first, other))
                cells.append(f"{two:9.1f} s ({one / two:4.2f} times, {kind})" if two else "")
        typer.echo(f"{name:<13} {stage:<13} {'  '.join(cells)}")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        _work()
    else:
        app()
