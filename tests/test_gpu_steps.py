"""``benchmarks/gpu.sh`` goes on where it was ended: a step that is done is not done again, one that failed is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"
# A stand-in for Python, that writes what each step would.
STAND_IN = """
import os, pathlib, sys
argv = sys.argv[1:]
place = pathlib.Path(os.environ["PLACE"])
with (place / "asked").open("a") as asked:
    asked.write(" ".join(argv) + "\\n")
if any(part in " ".join(argv) for part in os.environ.get("FAIL", "nothing").split(",")):
    sys.exit(1)
outputs = [argv[i + 1] for i, word in enumerate(argv) if word == "-o"] or [argv[1] + "/original"]
for out in map(pathlib.Path, outputs):
    if out.suffix != ".json":
        out.mkdir(parents=True, exist_ok=True)
        out /= "results.json"
    out.write_text("{}")
"""
STEPS = [
    "shape-0.14", "rates-0.14", "shape-0.25", "rates-0.25", "fp8-0.25", "prune-0.25", "onnx-bf16-original",
    "onnx-bf16-pruned", "onnx-bf16-rates", "onnx-int4-original", "onnx-int4-pruned", "onnx-int4-rates",
    "benchmark-0.25",
]  # fmt: skip


def run(tmp_path: Path, *steps: str, fail: str = "nothing") -> tuple[int, list[str]]:
    """The exit code, and the command of each step that was run."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "asked").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHON": f"{sys.executable} -S {tmp_path / 'stand_in.py'}", "PLACE": str(tmp_path)}
    environment |= {"FAIL": fail, "DEVICE": "cuda"}
    done = subprocess.run(["bash", SCRIPT, tmp_path / "out", *steps], env=environment, capture_output=True, text=True)
    return done.returncode, (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path):
    code, asked = run(tmp_path, fail="rates-0.14,onnx-int4-pruned")
    assert code == 1
    # The speed of what was not exported needs the export, which is tried once more.
    assert len(asked) == 1 + len(STEPS)
    written = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert written == set(STEPS) - {"rates-0.14", "onnx-int4-pruned", "onnx-int4-rates"}
    code, asked = run(tmp_path)
    assert code == 0
    assert len(asked) == 3
    shutil.rmtree(tmp_path / "out" / "models")
    assert run(tmp_path) == (0, [])


def test_a_step_can_be_named_and_makes_what_it_serves_on_a_machine_that_is_new(tmp_path):
    code, asked = run(tmp_path, "rates-0.25", "benchmark-0.25")
    models = tmp_path / "out" / "models"
    assert (code, len(asked)) == (0, 4)
    assert asked[0] == f"benchmarks/random_checkpoint.py {models} --shape llama-3-8b"
    assert f"prune {models}/original -o {models}/ranked-0.25 --sparsity 0.25 --no-compensate" in asked[1]
    assert "--method" not in asked[1]
    assert asked[2].startswith(f"benchmarks/two_servers.py {models}/original {models}/ranked-0.25 ")
    assert all(f"--load {load}" in asked[2] for load in ("1:4", "16:32", "64:128"))
    assert "--concurrency 1,16,64" in asked[3]
    assert {path.name for path in models.iterdir()} == {"original", "ranked-0.25"}
    shutil.rmtree(models)
    code, asked = run(tmp_path, "onnx-bf16-pruned")
    assert (code, len(asked)) == (0, 3)
    assert f"export onnx {models}/ranked-0.25" in asked[2]
