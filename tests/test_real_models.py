"""``benchmarks/real_models.py`` loses one cell when it is killed, says why a cell failed, and measures the product."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# A stand-in for the product: notes what it was asked, and writes and prints what the real one would.
STAND_IN = """
import json, os, pathlib, signal, sys
place, argv = pathlib.Path({place!r}), sys.argv[1:]
with (place / "asked").open("a") as asked:
    asked.write(" ".join(argv[:2] if argv[0] == "export" else argv[:1]) + "\\n")
if (place / "kill").exists() and argv[0] == "evaluate":
    os.kill(os.getppid(), signal.SIGKILL)
if (place / "fail").exists() and argv[:2] == ["export", "onnx"]:
    sys.exit("Error: The head does not fit. Use another.")
if "-o" in argv:
    pathlib.Path(argv[argv.index("-o") + 1]).mkdir(parents=True, exist_ok=True)
size = dict(num_parameters=10, weight_bytes=20)
texts = [argv[i + 1] for i, word in enumerate(argv) if word == "--text"]
print(json.dumps({{
    "prune": dict(kind="pruning_summary", sparsity=0.25, removed_attention=[], intermediate_size=[8],
                  calibration_metric={{}}, compensation=None, original=size, pruned=size),
    "evaluate": dict(kind="evaluation", evaluations=[
        dict(text=text, perplexity=20.0 if "original" in argv[argv.index("-o") + 1] else 30.0, standard_error=1,
             num_tokens=1, duration_s=1) for text in texts]),
}}.get(argv[0], dict(passed=True))))
"""
PATH_OF_ONE = ["evaluate", "export onnx", "export vllm", "verify"]


def write_texts(directory):
    (directory / "wikitext2_test.txt").write_text("The gardener prunes the trees in winter. " * 300)
    documents = [
        json.dumps({"text": f"Document {number} is about trees and their fruit. " * 4}) for number in range(700)
    ]
    (directory / "c4_sample_1000docs.jsonl").write_text("\n".join(documents) + "\n")


@pytest.fixture
def bench(monkeypatch, tmp_path, pico_model):
    """Runs the benchmark on two texts with a stand-in for the product; returns what was asked of it in this call."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measured_command
    import real_models

    write_texts(tmp_path)
    monkeypatch.setattr(measured_command, "SENTEI", STAND_IN.format(place=str(tmp_path)))
    asked = tmp_path / "asked"

    def run(*cells, **settings):
        asked.unlink(missing_ok=True)
        out, work = tmp_path / "results.json", tmp_path / "work"
        real_models.main([pico_model], out=out, data=tmp_path, work=work, cells=list(cells or ["*"]), **settings)
        return asked.read_text().splitlines() if asked.exists() else []

    run.place, run.module = tmp_path, real_models
    return run


def test_a_killed_run_loses_the_cell_that_it_was_in(bench):
    (bench.place / "kill").touch()
    killed = multiprocessing.get_context("fork").Process(
        target=bench, args=("*/default 0.25/prune", "*/default 0.25/evaluate")
    )
    killed.start()
    killed.join(60)
    assert killed.exitcode == -9
    (bench.place / "kill").unlink()
    assert bench("*/default 0.25/*") == PATH_OF_ONE
    assert bench("*/default 0.25/*") == []
    rows = json.loads((bench.place / "results.json").read_text())["models"]["pico"]
    assert list(rows["default 0.25"]) == ["prune", "evaluate", "export onnx", "export vllm", "verify vllm"]
    assert bench("*/original/evaluate") == ["evaluate"]
    assert (
        "| default 0.25 | 25.0% | 0 | 10 | 30.00 | 30.00 | 1.500 |  | verified | verified |"
        in (bench.place / "results.md").read_text()
    )


def test_what_is_still_lost_of_what_2ssp_loses(bench):
    """2SSP quadruples perplexity, this doubles it on one text and leaves the other as it was: half, and nothing."""

    def row(*perplexities: float):
        texts = zip(("wikitext2_test", "c4"), perplexities, strict=True)
        return {"evaluate": {"said": {text: {"perplexity": perplexity} for text, perplexity in texts}}}

    rows = {"original": row(20, 30), "default 0.5": row(40, 30), "2ssp 0.5": row(80, 120)}
    still_lost = bench.module._still_lost
    assert [still_lost(rows, each) for each in (*rows, "default 0.25")] == ["", "0.25", "", ""]


def test_a_cell_that_failed_says_why_and_is_run_again_when_asked(bench):
    (bench.place / "fail").touch()
    assert bench("*/original/*") == PATH_OF_ONE
    assert "- original, export onnx: The head does not fit. Use another." in (bench.place / "results.md").read_text()
    (bench.place / "fail").unlink()
    assert bench("*/original/*") == []
    assert bench("*/original/*", again=True) == ["export onnx"]
    assert "FAILED" not in (bench.place / "results.md").read_text()


def test_what_depends_on_a_setting_is_done_anew_and_nothing_else(bench):
    bench("*/2ssp 0.5/*", "*/original/*")
    assert bench("*/2ssp 0.5/*", "*/original/*", windows=3) == ["evaluate", "evaluate"]
    assert bench("*/2ssp 0.5/*", "*/original/*", windows=3, samples=5) == ["prune", *PATH_OF_ONE]


def test_an_export_that_was_verified_is_deleted_and_made_again_for_another_verification(bench):
    bench("*/2ssp 0.5/*")
    left = {path.name for path in (bench.place / "work" / "pico").iterdir()}
    assert left == {"2ssp-0.5", "2ssp-0.5-evaluation"}
    results = bench.place / "results.json"
    document = json.loads(results.read_text())
    del document["models"]["pico"]["2ssp 0.5"]["verify vllm"]
    results.write_text(json.dumps(document))
    assert bench("*/2ssp 0.5/*") == ["export vllm", "verify"]


def test_memory_and_reads_are_those_of_the_process_tree(bench, monkeypatch, tmp_path):
    """150 MB are held by a child of the child, and a file of 20 MB is mapped twice."""
    import measured_command

    file = tmp_path / "weights"
    file.write_bytes(os.urandom(20_000_000))
    child = "import time; held = b'x' * 150_000_000; time.sleep(0.6)"
    mapped = (
        f"m = mmap.mmap(os.open({str(file)!r}, os.O_RDONLY), 0, access=mmap.ACCESS_READ); sum(m[::4096]); m.close()"
    )
    program = (
        f"import mmap, os, subprocess, sys; {mapped}; subprocess.run([sys.executable, '-c', {child!r}]); {mapped}; "
        "print('Reading weights   ━━━━━━━━ 4/4 0:00:01 0:00:00', file=sys.stderr)"
    )
    monkeypatch.setattr(measured_command, "SENTEI", program)
    done = measured_command.measure_sentei([], log=tmp_path / "log", reads=[file])
    assert done.exit_code == 0, (tmp_path / "log").read_text()
    assert 150e6 < done.cost["peak_anonymous_bytes"] < 250e6
    (stage,) = done.cost["stages"]
    assert stage["stage"] == "Reading weights"
    assert stage["peak_anonymous_bytes"] > 150e6
    # tmp_path may be in memory, which is never read from a disk.
    assert done.cost["bytes_from_disk"] == 0 or 38e6 < done.cost["bytes_from_disk"] < 60e6
    assert done.cost["bytes_asked_of_read"] < 20e6


def test_the_product_itself_is_measured(bench, monkeypatch):
    import measured_command

    monkeypatch.undo()
    sys.path.insert(0, str(BENCHMARKS))
    assert "toolchain.cli" in measured_command.SENTEI
    began = time.monotonic()
    bench("*/default 0.25/prune", samples=2, seq_len=64, align=8, windows=1)
    cell = json.loads((bench.place / "results.json").read_text())["models"]["pico"]["default 0.25"]["prune"]
    assert cell["error"] is None
    assert cell["said"]["compensation"] is not None
    stages = [stage["stage"] for stage in cell["cost"]["stages"]]
    assert stages[0] == "Sensitivity of neurons"
    assert stages[-2:] == ["Compensation", "Writing the checkpoint"]
    assert 0 < cell["cost"]["wall_s"] < time.monotonic() - began
    assert cell["cost"]["peak_anonymous_bytes"] > 50e6


@pytest.mark.acceptance
def test_the_whole_path_of_a_pico_model(tmp_path, wide_model):
    write_texts(tmp_path)
    command = [
        sys.executable, str(BENCHMARKS / "real_models.py"), str(wide_model), "-o", str(tmp_path / "r.json"),
        "--data", str(tmp_path), "--work", str(tmp_path / "work"), "--samples", "2", "--seq-len", "64",
        "--windows", "1", "--cells", "*/default 0.25/*",
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)})
    cells = json.loads((tmp_path / "r.json").read_text())["models"]["wide"]["default 0.25"]
    assert len(cells) == 5
    assert {step: cell["error"] for step, cell in cells.items() if cell["error"]} == {}
