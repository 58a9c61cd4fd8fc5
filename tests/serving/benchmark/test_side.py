from types import SimpleNamespace

import pytest

from serving.benchmark.sessions.vllm_options import engine_options_for
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import Side, _check_comparable, open_sides
from serving.benchmark.workload import make_workloads
from toolchain.checkpoint import quantized
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError


def test_a_directory_is_opened_once(pico_model, monkeypatch):
    opened = []
    monkeypatch.setattr(quantized, "open_checkpoint", lambda path: (opened.append(path), open_checkpoint(path))[1])
    workloads = make_workloads(engine="vllm", input_len=8, output_len=4)
    settings = BenchmarkSettings(engine="vllm", workloads=workloads)
    sides = open_sides(pico_model, pico_model, settings)
    assert engine_options_for(sides["pruned"], settings, {})[:2] == ["--dtype", "float32"]
    assert sides["pruned"].layout == open_checkpoint(pico_model).layout
    assert opened == [pico_model] * 2


@pytest.mark.parametrize(("engine", "most"), [("onnx-server", 32), ("onnx", 256)])
def test_what_does_not_fit_is_refused_before_anything_starts(tmp_path, engine, most):
    """Of Phi-3, sentei's server takes what one rotary table holds; onnxruntime-genai changes tables."""
    facts = SimpleNamespace(precision="float32", weight_bytes=1, max_len=256, served_len=32)
    sides = {"original": Side(name="original", directory=tmp_path, facts=facts)}

    def check(num_tokens):
        workloads = make_workloads(engine=engine, input_len=num_tokens - 10, output_len=10, concurrency=[1])
        _check_comparable(sides, BenchmarkSettings(engine=engine, workloads=workloads))

    check(most)
    with pytest.raises(SenteiError, match=f"{most + 1} tokens.* do not fit the original model, which takes {most}"):
        check(most + 1)
