from serving.benchmark.sessions.vllm_options import engine_options_for
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import open_sides
from serving.benchmark.workload import make_workloads
from toolchain.checkpoint import quantized
from toolchain.checkpoint.directory import open_checkpoint


def test_a_directory_is_opened_once(pico_model, monkeypatch):
    opened = []
    monkeypatch.setattr(quantized, "open_checkpoint", lambda path: (opened.append(path), open_checkpoint(path))[1])
    workloads = make_workloads(engine="vllm", input_len=8, output_len=4)
    settings = BenchmarkSettings(engine="vllm", workloads=workloads)
    sides = open_sides(pico_model, pico_model, settings)
    assert engine_options_for(sides["pruned"], settings, {})[:2] == ["--dtype", "float32"]
    assert sides["pruned"].layout == open_checkpoint(pico_model).layout
    assert opened == [pico_model] * 2
