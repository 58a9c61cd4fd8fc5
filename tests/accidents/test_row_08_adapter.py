"""Row 8: a LoRA adapter left beside a model's weights changed what `evaluate` measured, without a word."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command_line import PLAIN, refused, sentei
from tests.conftest import prune_by_hand
from tests.quantized import write_quantized
from toolchain.checkpoint.directory import copy_companions
from toolchain.checkpoint.quantized import open_servable
from toolchain.errors import SenteiError
from toolchain.model.gguf import demo_gguf, import_gguf


@pytest.fixture
def with_adapter(pico_model: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(pico_model, directory)
    add_adapter(directory)
    return directory


def add_adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))


def test_every_command_that_opens_a_model_refuses_it(with_adapter: Path, pico_model: Path, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    for command in (
        ("evaluate", with_adapter, "--text", text, "-o", out),
        ("evaluate", pico_model, "--against", with_adapter, "--text", text, "-o", out),
        ("prune", with_adapter, "-o", out, "--sparsity", "0.25", "--calibration", text, *PLAIN),
        ("export", "vllm", with_adapter, "-o", out),
        ("export", "onnx", with_adapter, "-o", out),
        ("export", "nemotron-nas", with_adapter, "-o", out),
        ("quantize", with_adapter, "-o", out, "--scheme", "int8"),
        ("verify", pico_model, "--against", with_adapter),
        ("verify", with_adapter, "--against", pico_model),
        ("generate", with_adapter, "--prompt", "hi"),
        ("serve", with_adapter),
    ):
        done = sentei(*command)
        refused(done, "adapter_config.json", "Merge the adapter first")
        assert not out.exists(), command


def test_a_pruned_and_a_quantised_model_too(wide_model: Path, tmp_path: Path):
    pruned, quantised = tmp_path / "pruned", tmp_path / "quantised"
    pruned.mkdir()
    prune_by_hand(wide_model, pruned, removed_attention={1}, width=lambda layer: 64)
    copy_companions(wide_model, pruned)
    write_quantized(pruned, quantised, "int8")
    for directory in (pruned, quantised):
        open_servable(directory)
        add_adapter(directory)
        with pytest.raises(SenteiError, match=r"adapter_config\.json"):
            open_servable(directory)


def test_an_adapter_beside_a_gguf_file_is_not_added_to_it(tmp_path: Path):
    file = tmp_path / "downloads" / "model.gguf"
    file.parent.mkdir()
    file.symlink_to(demo_gguf())
    add_adapter(file.parent)
    with pytest.raises(SenteiError, match=r"adapter_config\.json"):
        import_gguf(file, tmp_path / "out")
