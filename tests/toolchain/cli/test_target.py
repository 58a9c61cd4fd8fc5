"""``sentei profile`` and ``sentei prune --target`` as a user meets them: one sentence, nothing half-written."""

from pathlib import Path

import pytest

from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.workload import make_workloads
from serving.profile.measure import Bench
from tests.command_line import refused, sentei
from tests.toolchain.costs.made import make_costs
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.costs.document import CheckRecord, read_costs
from toolchain.plan.plan import load_plan

TARGET = ("--target", "speedup=1.3")


@pytest.fixture
def costs(pico_model: Path, tmp_path: Path) -> Path:
    """Costs of the pico model on a machine that is not this one."""
    file = tmp_path / "costs.json"
    file.write_text(make_costs(open_checkpoint(pico_model).config).document.to_json())
    return file


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (TARGET, "--target needs --costs COSTS.json"),
        (("--sparsity", 0.3, "--costs", "COSTS"), "--costs is for --target"),
        ((*TARGET, "--costs", "COSTS", "--sparsity", 0.3), "Give --sparsity"),
        ((*TARGET, "--costs", "COSTS", "--sweep", "0.1:0.3:0.1"), "Give --sparsity"),
        ((*TARGET, "--costs", "COSTS", "--attention-removals", 1), "chooses what --attention-removals says"),
        ((*TARGET, "--costs", "COSTS", "--widths", "uniform"), "chooses what --widths says"),
        ((*TARGET, "--costs", "COSTS", "--max-degradation", 1.1), "--max-degradation would stop before"),
        ((*TARGET, "--costs", "COSTS", "--method", "2ssp"), "--method 2ssp is the published method"),
        ((*TARGET, "--costs", "COSTS", "--method", "shortgpt"), "knows no --target"),
        (("--target", "tpot=20", "--costs", "COSTS"), "20 of what?"),
        ((*TARGET, "--costs", "NOWHERE"), "does not exist"),
        ((*TARGET, "--costs", "COSTS"), "These costs were measured with another"),
    ],
)
def test_what_does_not_go_together_is_refused(pico_model: Path, costs: Path, tmp_path: Path, options: tuple, says: str):
    places = {"COSTS": costs, "NOWHERE": tmp_path / "nowhere.json"}
    words = [places.get(each, each) for each in options]
    refused(sentei("prune", pico_model, "-o", tmp_path / "out", *words), says)
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


@pytest.mark.parametrize(("options", "search"), [((), "racing"), (("--search", "exact"), "exact")])
def test_a_memory_that_is_met_is_said_part_by_part(
    pico_model: Path, text: Path, costs: Path, tmp_path: Path, options: tuple, search: str
):
    """Without any measurement, since bytes are counted; here the costs are of this machine."""
    workloads = make_workloads(engine="onnx", input_len=16, output_len=9, concurrency=[2])
    settings = BenchmarkSettings(engine="onnx", workloads=workloads, device="cpu")
    bench = Bench(checkpoint=open_checkpoint(pico_model), settings=settings, precision="fp32")
    document = read_costs(costs).document
    costs.write_text(document.model_copy(update={"served": bench.served}).to_json())
    target = ("--target", "memory=0.13MB@1x1", "--costs", costs, "--samples", 2, "--seq-len", 64, "--align", 4)
    done = sentei(
        "prune", pico_model, "-o", tmp_path / "out", "--calibration", text, *target, "--no-compensate", *options
    )
    assert done.returncode == 0, done.stderr
    assert "by part, ms_per_output_token; damage before compensation:" in done.stdout
    assert "no layer's" in done.stdout
    assert load_plan(tmp_path / "out").document.search == search


@pytest.mark.parametrize("error, warned", [(0.05, False), (0.2, True)])
def test_a_machine_that_was_not_quiet_is_told_of(
    pico_model: Path, costs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, warned: bool
):
    found = read_costs(costs).document
    check = [CheckRecord(model="small", quantity="tpot_ms", predicted=1.0, measured=1.0, error=error)]
    monkeypatch.setattr("serving.profile.profile.profile", lambda *_, **__: found.model_copy(update={"check": check}))
    done = sentei("profile", pico_model, "-o", tmp_path / "new.json", "--engine", "onnx", "--input-len", 16)
    assert done.returncode == 0, done.stderr
    assert ("Targets will be met no better than that" in done.stdout) == warned


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--engine", "onnx", "--dtype", "bfloat16"), "--dtype and --engine-option are vLLM's"),
        (("--engine", "vllm", "--precision", "int4"), "are of an ONNX export"),
        (("--engine", "onnx", "--input-len", 256, "--output-len", 1), "reads at most 256"),
        (("--engine", "onnx", "--repeats", 0), "greater than or equal"),
        (("--engine", "vllm", "--engine-option=--quantization=fp8"), "is not one whose effect the expectation knows"),
    ],
)
def test_what_cannot_be_profiled_is_refused(pico_model: Path, tmp_path: Path, options: tuple, says: str):
    refused(sentei("profile", pico_model, "-o", tmp_path / "costs.json", *options), says)
    assert not list(tmp_path.iterdir())
