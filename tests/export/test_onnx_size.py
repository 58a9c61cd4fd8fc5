"""A model whose graph and weights do not fit into one protobuf message, of 2 GB at most."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from serving.engines.genai import stream_tokens
from serving.engines.onnxruntime import OnnxEngine
from serving.engines.transformers import TransformersEngine
from toolchain.checkpoint.directory import copy_companions, open_checkpoint

IDS = list(range(100, 116))
# Of the exporting process, by what the weights take in float32; docs/decisions/onnx-size.md has what was measured.
_MEMORY_LIMIT = 1.1


@pytest.fixture(scope="module")
def large_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 0.66 billion parameters in bfloat16."""
    directory = tmp_path_factory.mktemp("large") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1536, intermediate_size=6144, num_hidden_layers=15, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=49152, max_position_embeddings=512,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(directory)
    finally:
        torch.set_default_dtype(torch.float32)
    copy_companions(demo_model, directory)
    return directory


@pytest.mark.acceptance
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_more_than_two_gigabytes(large_model: Path, precision: str, tmp_path: Path) -> None:
    float32_bytes = 4 * open_checkpoint(large_model).num_parameters
    assert float32_bytes > 2**31
    out = tmp_path / "out"
    peak_bytes = export_in_a_process(large_model, out, precision)
    print(f"{precision}: {peak_bytes / 1e9:.2f} GB at most, weights in float32 {float32_bytes / 1e9:.2f} GB")
    assert peak_bytes < _MEMORY_LIMIT * float32_bytes + 1e9  # for libraries and tokenizer
    assert (out / "model.onnx").stat().st_size < 2**20
    engine = OnnxEngine(out)
    tokens = engine.generate(IDS, 4)
    assert list(stream_tokens(out, IDS, 4)) == tokens
    actual = engine.log_probabilities(IDS)
    expected = TransformersEngine(large_model, dtype=torch.float32).log_probabilities(IDS)
    if precision == "fp32":
        assert (out / "model.onnx.data").stat().st_size >= float32_bytes > 2**31
        assert (actual - expected).abs().max() <= 1e-3
    else:
        assert (expected.exp() * (expected - actual)).sum(-1).mean() <= 0.1


def export_in_a_process(directory: Path, out: Path, precision: str) -> int:
    """Exports; returns the most memory that the process had at any time, in bytes."""
    script = (
        "import sys; from pathlib import Path; from export.onnx_graph import export_onnx;"
        "export_onnx(Path(sys.argv[1]), Path(sys.argv[2]), precision=sys.argv[3]);"
        "print(Path('/proc/self/status').read_text())"
    )
    # Not getrusage: its ru_maxrss counts the parent's memory at the time of the fork.
    status = subprocess.run(
        [sys.executable, "-c", script, directory, out, precision], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
