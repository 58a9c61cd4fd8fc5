import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from export.onnx_graph import export_onnx
from serving.benchmark import run as benchmark_module
from serving.benchmark.journal import open_journal
from serving.benchmark.run import schedule
from serving.benchmark.sessions.local import LocalSession, patience_s
from serving.benchmark.sessions.worker import random_prompts
from serving.benchmark.sessions.worker_process import Worker, running_worker
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import open_sides
from serving.benchmark.workload import WARMUP_SEED, make_workloads
from serving.child_process import child_process
from serving.forecast.model_facts import checkpoint_facts, expected_gains, onnx_facts
from tests.command_line import sentei
from tests.conftest import SMALL_VOCABULARY, make_pico, prune_by_hand
from tests.serving.benchmark.asking import ask_benchmark as benchmark
from toolchain.checkpoint.directory import copy_companions, open_checkpoint, write_weights
from toolchain.errors import SenteiError

TINY = {"input_len": 12, "output_len": 4, "repeats": 3}


@pytest.fixture(scope="module")
def pruned_pico(pico_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "pico-pruned"
    directory.mkdir()
    prune_by_hand(pico_model, directory, removed_attention={0, 2}, width=lambda layer: 24 + 8 * (layer % 2))
    copy_companions(pico_model, directory)
    return directory


def check_results(results, out, *, engine, repeats):
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (results["schema_version"], results["kind"], results["engine"]) == (1, "benchmark", engine)
    (measurement,) = results["measurements"]
    assert [run["repeat"] for run in measurement["runs"]] == list(range(repeats))
    for metric in measurement["metrics"].values():
        assert metric["formula"]
        assert metric["gain"]["low"] <= metric["gain"]["value"] <= metric["gain"]["high"]
        assert len(metric["original"]["values"]) == repeats
    assert measurement["expected"]["mean_tpot_ms"]["gain"] > 1
    assert measurement["expected"]["mean_ttft_ms"]["gain"] > 1
    assert results["sizes"]["weight_bytes"]["ratio"] < 1
    assert results["sizes"]["kv_bytes_per_token"]["ratio"] == pytest.approx(0.5)
    assert results["environment"]["versions"]["torch"]


@pytest.mark.acceptance
def test_transformers_end_to_end(pico_model, pruned_pico, tmp_path):
    told = []
    results = benchmark(
        pico_model, pruned_pico, engine="transformers", out=tmp_path / "out", concurrency=[2], num_prompts=4,
        device="cpu", on_progress=told.append, **TINY,
    )  # fmt: skip
    check_results(results, tmp_path / "out", engine="transformers", repeats=3)
    assert len(told) == 6
    assert (
        results["sizes"]["peak_memory_bytes"]["original"] > results["models"]["original"]["baseline_memory_bytes"] > 0
    )
    assert results["measurements"][0]["workload"]["num_prompts"] == 4
    assert not (tmp_path / "out.partial").exists()


def export_with_stock_builder(directory, out, **overrides):
    """An ONNX model as onnxruntime-genai's own builder makes it: the benchmark must read any, not only ours."""
    make_pico(directory, hidden_size=64, **overrides)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    subprocess.run([*command, "-i", str(directory), "-o", str(out)], check=True, capture_output=True)


def test_onnx_end_to_end(demo_model, tmp_path):
    for name, width in (("original", 96), ("pruned", 48)):
        (tmp_path / name).mkdir()
        copy_companions(demo_model, tmp_path / name)
        export_with_stock_builder(tmp_path / name, tmp_path / f"onnx-{name}", intermediate_size=width)
        from_graph, from_weights = onnx_facts(tmp_path / f"onnx-{name}"), checkpoint_facts(tmp_path / name, None)
        for fact in ("num_parameters", "kv_bytes_per_token", "decode_weight_bytes", "block_matrix_parameters"):
            assert getattr(from_graph, fact) == getattr(from_weights, fact), fact
        assert from_graph.attention_width == from_weights.attention_width
        assert from_graph.head_parameters == from_weights.head_parameters
    out = tmp_path / "out"
    results = benchmark(
        tmp_path / "onnx-original",
        tmp_path / "onnx-pruned",
        engine="onnx",
        out=out,
        concurrency=[2],
        device="cpu",
        **TINY,
    )
    assert json.loads((out / "results.json").read_text())["engine"] == "onnx"
    (measurement,) = results["measurements"]
    assert all(metric["gain"] for metric in measurement["metrics"].values())
    assert measurement["workload"]["num_prompts"] == 2
    assert results["sizes"]["peak_memory_bytes"]["pruned"] > 0
    assert results["sizes"]["weight_bytes"]["ratio"] < 1


def test_exports_of_unlike_bits_are_not_comparable(wide_model, tmp_path):
    for precision in ("int8", "int4"):
        export_onnx(wide_model, tmp_path / precision, precision=precision)
        # An int4 export has matrices in 8 bits too: its head, and the most sensitive ones.
        assert onnx_facts(tmp_path / precision).precision == precision
    with pytest.raises(SenteiError, match="original is int8 and the pruned model int4"):
        benchmark(tmp_path / "int8", tmp_path / "int4", engine="onnx", out=tmp_path / "out", **TINY)


def test_a_directory_that_is_no_onnx_export_is_refused(pico_model, tmp_path):
    with pytest.raises(SenteiError, match=r"no genai_config\.json"):
        benchmark(pico_model, pico_model, engine="onnx", out=tmp_path / "out", **TINY)


def test_an_onnx_export_for_another_engine_is_refused(pico_model, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    (export / "genai_config.json").write_text("{}")
    with pytest.raises(SenteiError, match="is an ONNX export"):
        benchmark(pico_model, export, engine="transformers", out=tmp_path / "out", **TINY)
    with pytest.raises(SenteiError, match="is damaged"):
        benchmark(export, export, engine="onnx", out=tmp_path / "out", **TINY)


def test_order_alternates():
    visits = [(visit.side, visit.repeat, visit.load) for visit in schedule(3, 1, both_up=True)]
    assert visits == [
        ("original", 0, 0), ("pruned", 0, 0), ("pruned", 1, 0), ("original", 1, 0), ("original", 2, 0),
        ("pruned", 2, 0),
    ]  # fmt: skip


def test_where_one_server_is_up_at_a_time_it_takes_every_load_in_a_row():
    sides = [visit.side[0] for visit in schedule(2, 3, both_up=False)]
    assert "".join(sides) == "oooppppppooo"
    assert "".join(visit.side[0] for visit in schedule(2, 3, both_up=True)) == "op" * 3 + "po" * 3


def test_prompts_are_the_same_for_the_same_seed():
    assert random_prompts(2, 5, 100, 3) == random_prompts(2, 5, 100, 3) != random_prompts(2, 5, 100, 4)


def test_expectation_from_parameters(tmp_path):
    make_pico(tmp_path / "a", vocab_size=64)
    facts = checkpoint_facts(tmp_path / "a", None)
    block = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert facts.block_matrix_parameters == block
    assert facts.head_parameters == 64 * 32
    assert facts.decode_weight_bytes == 4 * (block + 64 * 32 + 9 * 32)
    assert facts.kv_bytes_per_token == 4 * 2 * 16 * 4
    assert facts.prefill_flops(10) == 2 * block * 10 + 2 * 64 * 32 + 2 * 100 * 32 * 4
    medians = {"mean_ttft_ms": 50.0, "mean_e2el_ms": 100.0}
    same = expected_gains(facts, facts, input_len=8, output_len=8, concurrency=1, original_medians=medians)
    assert {entry["gain"] for entry in same.values()} == {1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 2}, "repeats"),
        ({"input_len": 0}, "input_len"),
        ({"input_len": 1000}, "do not fit"),
        ({"concurrency": [4], "num_prompts": 2}, "num_prompts"),
        ({"dtype": "int3"}, "dtype"),
        ({"engine": "llama"}, "Engine"),
        ({"concurrency": [0]}, "concurrency"),
        ({"primary": "speed"}, "primary metric"),
        ({"engine_options": ["--x"]}, "options"),
    ],
)
def test_bad_settings_are_refused_before_work(pico_model, pruned_pico, tmp_path, settings, message):
    with pytest.raises(SenteiError, match=message):
        benchmark(pico_model, pruned_pico, out=tmp_path / "out", **({"engine": "transformers", **TINY} | settings))
    assert not list(tmp_path.iterdir())


def test_unlike_precisions_are_refused(pico_model, tmp_path):
    make_pico(tmp_path / "half", vocab_size=SMALL_VOCABULARY)
    checkpoint = open_checkpoint(tmp_path / "half")
    shapes = {name: (info.shape, torch.bfloat16) for name, info in checkpoint.tensors.items()}
    half = {name: checkpoint.read(name).bfloat16() for name in shapes}
    write_weights(tmp_path / "half", shapes, half.__getitem__)
    with pytest.raises(SenteiError, match="original is float32 and the pruned model bfloat16"):
        benchmark(pico_model, tmp_path / "half", engine="transformers", out=tmp_path / "out", **TINY)
    # Unless somebody wants to know just that; the results say so.
    asked = BenchmarkSettings(
        engine="transformers", workloads=make_workloads(engine="transformers", input_len=8, output_len=4),
        mixed_precision=True,
    )  # fmt: skip
    sides = open_sides(pico_model, tmp_path / "half", asked)
    assert {side.facts.precision for side in sides.values()} == {"float32", "bfloat16"}
    assert asked.options["mixed_precision"] is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_said(pico_model, pruned_pico, tmp_path):
    with pytest.raises(SenteiError, match="no CUDA device"):
        benchmark(pico_model, pruned_pico, engine="transformers", out=tmp_path / "out", device="cuda", **TINY)
    assert not list(tmp_path.iterdir())


def test_a_full_output_directory_is_refused(pico_model, pruned_pico, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(SenteiError, match="not empty"):
        benchmark(pico_model, pruned_pico, engine="transformers", out=tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.fixture
def deaths(monkeypatch):
    """Kills the pruned model's worker before as many of its questions as the list says, warm-ups not counted."""
    left = []

    def kill(worker):
        worker.process.send_signal(signal.SIGKILL)
        worker.process.wait()

    before_a_question(monkeypatch, left, kill)
    return left


def before_a_question(monkeypatch, left, happens):
    ask = LocalSession._ask

    def ask_later(self, worker, workload, seed, output_len):
        if worker.name == "pruned" and seed < WARMUP_SEED and left and left.pop(0):
            happens(worker)
        return ask(self, worker, workload, seed, output_len)

    monkeypatch.setattr(LocalSession, "_ask", ask_later)


@pytest.mark.acceptance
def test_a_worker_that_hangs_is_killed_and_counted(pico_model, pruned_pico, tmp_path, monkeypatch):
    hung = []

    def stop(worker):
        hung.append(worker.process)
        worker.process.send_signal(signal.SIGSTOP)

    before_a_question(monkeypatch, [True, True], stop)
    settings = {"engine": "transformers", "out": tmp_path / "out", **TINY}
    with pytest.raises(
        SenteiError, match=r"(?s)repeat 1 of 3: pruned: failed twice.*hung: no token for 2 s.*last words"
    ):
        benchmark(pico_model, pruned_pico, stall_timeout_s=2, **settings)
    assert [process.returncode for process in hung] == [-signal.SIGKILL] * 2
    journal = (tmp_path / "out.unfinished" / "measured.jsonl").read_text().splitlines()
    failures = [json.loads(line)["failure"] for line in journal if "failure" in line]
    assert [(each["side"], each["failed"]) for each in failures] == [("pruned", 1)] * 2


def test_a_worker_that_is_only_slow_is_waited_for(tmp_path):
    """A sign of life a second keeps it: 3 s of tokens are more than 2 s of patience."""
    script = (
        "import time\nfor _ in range(6): time.sleep(0.5); print(flush=True)\nprint('{\"requests\": []}', flush=True)"
    )
    with child_process([sys.executable, "-c", script], os.environ, tmp_path / "log", talks=True) as process:
        assert Worker("pruned", process, tmp_path / "log").ask("measure", timeout_s=2) == {"requests": []}


def test_a_worker_has_longer_for_a_longer_batch_of_prompts():
    one, eight = make_workloads(engine="onnx", input_len=4096, concurrency=[1, 8])
    assert (patience_s(one, 600), patience_s(eight, 600)) == (1200, 9600)
    assert patience_s(make_workloads(engine="onnx", input_len=8)[0], 600) == 600


@pytest.mark.acceptance
def test_a_worker_that_dies_once_is_started_again_and_told_of(pico_model, pruned_pico, tmp_path, deaths):
    deaths += [False, True]
    told = []
    results = benchmark(
        pico_model, pruned_pico, engine="transformers", out=tmp_path / "out", on_progress=told.append, **TINY
    )
    (failure,) = results["failed_attempts"]
    assert (failure["repeat"], failure["side"], failure["failed"]) == (1, "pruned", 1)
    assert "killed by signal 9" in failure["error"]
    assert any("is tried once more" in line for line in told)
    assert results["measurements"][0]["metrics"]["output_throughput"]["gain"]


@pytest.mark.acceptance
def test_a_worker_that_keeps_dying_stops_the_benchmark_which_resumes(pico_model, pruned_pico, tmp_path, deaths):
    out = tmp_path / "out"
    settings = {"engine": "transformers", "out": out, **TINY}
    deaths += [False, True, True]
    with pytest.raises(SenteiError, match=r"(?s)repeat 2 of 3: pruned: failed twice.*signal 9.*--resume continues"):
        benchmark(pico_model, pruned_pico, **settings)
    assert not out.exists()
    with pytest.raises(SenteiError, match="interrupted benchmark"):
        benchmark(pico_model, pruned_pico, **settings)
    with pytest.raises(SenteiError, match="begun with another repeats: 3 then, 4 now"):
        benchmark(pico_model, pruned_pico, resume=True, **(settings | {"repeats": 4}))
    journal = tmp_path / "out.unfinished" / "measured.jsonl"
    before = [json.loads(line) for line in journal.read_text().splitlines()]
    with journal.open("a") as file:
        file.write('{"key": [2, 0, "ori')  # as a kill in the middle of a write leaves it
    results = benchmark(pico_model, pruned_pico, resume=True, **settings)
    kept = [entry["metrics"] for entry in before if "key" in entry]
    runs = results["measurements"][0]["runs"]
    assert [runs[0]["original"], runs[0]["pruned"]] == kept
    assert len(results["failed_attempts"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_interrupted_benchmark_says_how_to_go_on(pico_model, pruned_pico, tmp_path, monkeypatch):
    def interrupted(original, pruned, settings, *, out, **how):
        with open_journal(out, {}, force=False, resume=False, inputs=()) as journal:
            journal.record((0, 0, "original"), {"output_throughput": 1.0}, {})
            raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_module, "benchmark", interrupted)
    done = sentei("benchmark", pico_model, pruned_pico, "--engine", "transformers", "-o", tmp_path / "out")
    assert done.returncode == 130
    assert "The same command with --resume continues from there.\nInterrupted." in done.stderr.replace("\r", "")


@pytest.mark.acceptance
def test_a_worker_that_never_answers_leaves_its_failures(pico_model, pruned_pico, tmp_path, deaths):
    deaths += [True, True]
    with pytest.raises(SenteiError, match="failed twice"):
        benchmark(pico_model, pruned_pico, engine="transformers", out=tmp_path / "out", **TINY)
    benchmark(pico_model, pruned_pico, engine="transformers", out=tmp_path / "out", force=True, **TINY)


@pytest.mark.acceptance
def test_a_sweep_measures_every_load(pico_model, pruned_pico, tmp_path):
    results = benchmark(
        pico_model, pruned_pico, engine="transformers", out=tmp_path / "out", concurrency=[1, 3], **TINY
    )
    assert [each["workload"]["concurrency"] for each in results["measurements"]] == [1, 3]
    assert [each["workload"]["num_prompts"] for each in results["measurements"]] == [1, 3]
    for measurement in results["measurements"]:
        assert measurement["failed_requests"] == {"original": 0, "pruned": 0}


def test_a_crashing_worker_shows_its_last_words(tmp_path):
    with running_worker("pruned", tmp_path / "log") as worker, pytest.raises(SenteiError, match="KeyError: 'no such"):
        worker.ask("load", timeout_s=60, engine="no such engine", directory="x", device="cpu", dtype=None)


def test_a_worker_passes_bad_input_on(tmp_path):
    with running_worker("original", tmp_path / "log") as worker, pytest.raises(SenteiError, match="does not exist"):
        worker.ask(
            "load", timeout_s=60, engine="transformers", directory=str(tmp_path / "none"), device="cpu", dtype=None
        )


def test_workers_die_with_a_killed_parent(tmp_path):
    script = (
        "import time; from pathlib import Path; from serving.benchmark.sessions.worker_process import running_worker\n"
        f"with running_worker('original', Path({str(tmp_path / 'log')!r})) as worker:\n"
        "    print(worker.process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(1)
        parent.kill()
    for _ in range(600):  # a worker that is still importing on a busy machine ends after that
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if _is_zombie(pid):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def _is_zombie(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_leaving_a_worker_ends_it(tmp_path):
    with running_worker("original", tmp_path / "log") as worker:
        assert worker.process.poll() is None
    assert worker.process.returncode == -signal.SIGKILL
